"""The report, in a real browser: it shows, zooms and prints, and no name in it does anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.problem import AttentionProblem
from mdattn_mpi.report.page import Job, page
from mdattn_mpi.report.runs import read_runs
from tests.support.browser import Browser, Page, chromium
from tests.support.finished import finished
from tests.support.synthetic_run import write_run

EVIL = "</script><script>document.title='evil'</script><img src=x onerror=\"wrong='evil'\">&'"
NAMES = ("plain", EVIL, "ünï-\x1b[31m-\x00\udcff")
HELPERS = """
  const canvas = document.querySelector("#timeline canvas");
  const range = () => document.querySelector("#timeline .range").textContent;
  await until(range);
  const painted = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  const press = async key => {
    canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    await painted();
    return range();
  };
  const drawn = () => {
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const style = getComputedStyle(document.documentElement);
    const count = {};
    for (const name of ["compute", "agree", "begin", "read", "write", "sync", "exchange"]) {
      const hex = style.getPropertyValue("--" + name).trim().slice(1);
      const [r, g, b] = [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16));
      count[name] = 0;
      for (let n = 0; n < pixels.length; n += 4)
        if (pixels[n] === r && pixels[n + 1] === g && pixels[n + 2] === b) count[name]++;
    }
    return count;
  };
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def write_page(folder: Path, names: Sequence[str] = NAMES, **changes: Any) -> Path:
    """A page about the runs in a folder."""
    facts = {
        "path": str(folder / "out.h5"),
        "state": "finished",
        "counts": {"total": len(names), "done": len(names), "todo": 0, "failed": 0},
        "names": names,
        "tokens": [1000] * len(names),
        "reasons": [""] * len(names),
        "runs": read_runs(folder / "run"),
    }
    path = folder / "report.html"
    path.write_bytes(page(Job(**{**facts, **changes})).encode(errors="backslashreplace"))
    return path


def ask(shown: Page, body: str) -> Any:
    return shown.ask(HELPERS + body)


def hover(shown: Page, x: int, y: int) -> str:
    """Move the mouse over the canvas; return what the page says of that place."""
    box = shown.ask("""
      const canvas = document.querySelector("#timeline canvas");
      canvas.scrollIntoView({ block: "center" });
      const box = canvas.getBoundingClientRect();
      return [box.left, box.top];""")
    shown.tell("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + x, y=box[1] + y)
    said: str = shown.ask("return document.querySelector('#timeline .span').textContent")
    return said


def width_of(text: str) -> float:
    """Seconds from one time to the other, as in ``1.5 ms to 2 s``."""
    units = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}
    low, high = (
        float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (µs|ms|s)", text)
    )
    return high - low


def test_it_zooms_and_says_what_is_where(tmp_path: Path, browser: Browser) -> None:
    write_run(tmp_path / "run", NAMES, ranks=3, item_seconds=1.0, slow=(1, 2))
    with browser.page(write_page(tmp_path)) as shown:
        whole = ask(shown, "return range()")
        drawn = ask(shown, "return drawn()")
        assert all(drawn.values()), drawn
        there = hover(shown, 110, 28)
        assert "rank 0 on node0, main thread: enqueue" in there
        assert " plain " in there
        assert "rank 1" in hover(shown, 110, 28 + 64)
        near = ask(shown, "for (const key of '++') await press(key); return await press('+')")
        later = ask(shown, "await press('ArrowRight'); return await press('d')")
        again = ask(shown, "return await press('0')")
        wheel = ask(
            shown,
            """canvas.dispatchEvent(new WheelEvent("wheel", {
                 ctrlKey: true, deltaY: -400, bubbles: true, cancelable: true }));
               await painted();
               return range();""",
        )
        label = "document.querySelectorAll('#timeline button')"
        button = ask(shown, f"{label}[4].click(); await painted(); return range()")
    assert again == whole == button
    assert len({whole, near, later, wheel}) == 4
    assert width_of(near) == pytest.approx(width_of(whole) / 8, rel=0.02)
    assert width_of(later) == pytest.approx(width_of(near), rel=0.02)
    assert width_of(wheel) < width_of(whole) / 2


def test_names_are_text_wherever_they_stand(tmp_path: Path, browser: Browser) -> None:
    write_run(tmp_path / "run", NAMES, ranks=2)
    places = {"path": f"/x/{EVIL}", "death": f"rank {EVIL}\n  {EVIL}", "reasons": ["", EVIL, ""]}
    with browser.page(write_page(tmp_path, **places)) as shown:
        text, images = shown.ask("return [document.body.innerText, document.images.length]")
        assert images == 0
        assert text.count(EVIL) >= 5
        name = EVIL.rpartition("/")[2]
        assert shown.ask("return [document.title, window.wrong]") == [f"{name}: finished", None]
        assert f" {EVIL} " in hover(shown, 450, 28)


def test_it_needs_no_network(tmp_path: Path) -> None:
    write_run(tmp_path / "run", NAMES, ranks=2)
    text = write_page(tmp_path, names=("a", "b", "c")).read_text()
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://|fetch\(|XMLHttp", text)


def test_it_follows_the_scheme_and_prints_in_light(tmp_path: Path, browser: Browser) -> None:
    write_run(tmp_path / "run", NAMES, ranks=2)
    back = "return getComputedStyle(document.body).backgroundColor"
    with browser.page(write_page(tmp_path)) as shown:
        assert shown.ask(back) == "rgb(255, 255, 255)"
        light = ask(shown, "return drawn()")["compute"]
        shown.prefer("dark")
        assert shown.ask(back) == "rgb(13, 17, 23)"
        dark = ask(shown, "await painted(); await painted(); return drawn()")["compute"]
        assert min(light, dark) > 1000
        printed = ask(
            shown,
            """dispatchEvent(new Event("beforeprint"));
               const colours = getComputedStyle(document.documentElement);
               const printed = [drawn().compute, colours.getPropertyValue("--compute").trim()];
               dispatchEvent(new Event("afterprint"));
               await painted();
               return [...printed, drawn().compute]""",
        )
        assert printed == [light, "#2166ac", dark]
        assert shown.pdf().startswith(b"%PDF")


def test_runs_can_be_chosen(tmp_path: Path, browser: Browser) -> None:
    write_run(tmp_path / "run", NAMES, ranks=2, run=7, closed=False)
    write_run(tmp_path / "run", NAMES, ranks=3, run=8, item_seconds=3.0)
    report = write_page(tmp_path)
    assert "still running, or killed" in report.read_text()
    with browser.page(report) as shown:
        last, late = ask(shown, "return [document.querySelector('select').value, range()]")
        early = ask(
            shown,
            """const select = document.querySelector("select"), before = range();
               select.value = 0;
               select.onchange();
               await until(() => range() != before);
               return range();""",
        )
        assert "rank 1 on node0" in hover(shown, 110, 28 + 64)
        assert hover(shown, 110, 28 + 2 * 64) == ""
    assert last == "1"
    assert width_of(late) > 5 * width_of(early) > 0


def test_a_large_job_is_a_page_of_a_few_megabytes(tmp_path: Path, browser: Browser) -> None:
    names = [f"protein-{number:05}" for number in range(1000)]
    write_run(tmp_path / "run", names, ranks=64, slow=(5, 333))
    report = write_page(tmp_path, names=names)
    assert report.stat().st_size < 4 << 20
    assert "protein-00333" in report.read_text().split("Slowest items")[1].split("</tr>")[1]
    with browser.page(report) as shown:
        drawn = ask(shown, "return drawn()")
        assert drawn["compute"] > 10 * drawn["agree"] > 0
        shown.resize(380, 800)
        scrolls = "const page = document.documentElement; return page.scrollWidth"
        assert ask(shown, f"await painted(); {scrolls}") <= 380


def test_what_can_not_be_reported_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["report", *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "none.h5" in refused(str(tmp_path / "none.h5"))
    out = finished(tmp_path, {"a": AttentionProblem(4, 4, 1, 1, 8, 8)}).output
    assert main(["report", str(out)]) == 0
    assert "No rank has kept what it did" in Path(f"{out}.html").read_text()
    assert "name another place" in refused(str(out), "-o", str(tmp_path / "no" / "page.html"))
    for place in (("-o", str(out)), ("--trace", str(out))):
        assert "no report or trace of ours" in refused(str(out), *place)
    assert main(["status", str(out)]) == 0
    folder = Path(f"{out}.run")
    folder.mkdir()
    (folder / "events-0000.jsonl").write_text('{"run":1,"rank":0,"main":{}}\n')
    assert "remove events-*.jsonl" in refused(str(out))


def test_a_plan_stands_beside_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = {f"item-{number}": AttentionProblem(4, 4, 1, 1, 8, 8) for number in range(7)}
    out = finished(tmp_path, problems).output
    write_run(Path(f"{out}.run"), [*problems], ranks=2, item_seconds=10.0)
    plan = tmp_path / "plan.json"
    known = {"nodes": 1, "starting_seconds": 2.0, "waits_for": "cores"}
    plans = [
        {**known, "ranks_per_node": 4, "seconds": 1.0},
        {**known, "ranks_per_node": 2, "seconds": 37.0},
    ]
    plan.write_text(json.dumps({"plans": plans}))
    assert main(["report", str(out), "--plan", str(plan)]) == 0
    rows = Path(f"{out}.html").read_text().split("Plan and measured")[1].split("</table>")[0]
    figures = re.findall(r'<td class="number">(.*?)</td>', rows)
    assert figures[3] == "35.0 s"
    assert float(figures[5]) == pytest.approx(2.0, rel=0.1)
    capsys.readouterr()
    for text, words in (
        (json.dumps({"plans": plans[:1]}), "has plans for 4 ranks, and the job had 2"),
        ("{}", "is no plan"),
    ):
        plan.write_text(text)
        assert main(["report", str(out), "--plan", str(plan)]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
