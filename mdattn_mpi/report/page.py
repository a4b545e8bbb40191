"""The report: one HTML file that needs nothing else, from what a job left in its run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from mdattn_mpi.report.charts import legend, progress_chart, rank_bars
from mdattn_mpi.report.expected import Plan
from mdattn_mpi.report.findings import slowest_items, spreads, verdict
from mdattn_mpi.report.markup import Element, add, document, table
from mdattn_mpi.report.phases import THREADS, phase_of
from mdattn_mpi.report.runs import Run
from mdattn_mpi.report.timeline import timeline_data
from mdattn_mpi.text import counted, duration, quantity

MOST_FAILED = 100  # items that are listed


@dataclass(frozen=True)
class Job:
    """All that a report is made of.

    Attributes
    ----------
    path
        The output.
    state
        In a word or two, such as ``finished``.
    counts
        Items ``total``, ``done``, ``todo`` and ``failed``.
    names, tokens, reasons
        Of each item, by its number: what it is called, how long it is, and why it failed, if so.
    runs
        The earliest first.
    death
        The message of the death note, if there is one; its last line is a command.
    plan
        What was expected of it, if anybody has asked before.

    """

    path: str
    state: str
    counts: Mapping[str, int]
    names: Sequence[str]
    tokens: Sequence[int]
    reasons: Sequence[str]
    runs: Sequence[Run]
    death: str = ""
    plan: Plan | None = None

    @cached_property
    def seconds(self) -> float:
        """How long its runs worked on items."""
        return sum(run.until for run in self.runs) / 1e6

    def name_of(self, item: int) -> str:
        """What the item of a span is called."""
        return self.names[item] if 0 <= item < len(self.names) else f"item number {item}"


def page(job: Job) -> str:
    """Write the whole page."""
    root = Element("html", lang="en")
    head = add(root, "head")
    add(head, "meta", charset="utf-8")
    add(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    add(head, "title", f"{Path(job.path).name}: {job.state}")
    add(head, "style").text = _asset("page.css")
    body = add(add(root, "body"), "main")
    _heading(body, job)
    if job.runs:
        _what_ran(body, job)
        _plan(body, job)
        _over_time(body, job)
        for number in reversed(range(len(job.runs))):
            _run(body, job, number)
        _timeline(body, job)
        _slowest(body, job)
    else:
        add(
            body,
            "p",
            "No rank has kept what it did when: this output was made before ranks did, its run "
            "folder was removed, or no run has come as far as the first item.",
        )
    _failed(body, job)
    return document(root)


def _asset(name: str) -> str:
    return files("mdattn_mpi.report").joinpath(name).read_text("utf-8")


def _section(body: Element, title: str) -> Element:
    section = add(body, "section")
    add(section, "h2", title)
    return section


def _heading(body: Element, job: Job) -> None:
    add(body, "h1", Path(job.path).name)
    add(body, "p", f"{job.path}: {job.state}", class_="state")
    tiles = add(body, "div", class_="tiles")
    for figure, words in _tiles(job):
        tile = add(tiles, "div")
        add(tile, "b", figure)
        add(tile, "span", words)
    if job.death:
        note = add(body, "div", class_="death")
        add(note, "h2", "A rank was lost")
        *lines, command = job.death.splitlines()
        add(note, "p", " ".join(line.strip() for line in lines).removeprefix("mdattn: "))
        add(note, "pre", command.strip())


def _tiles(job: Job) -> Iterator[tuple[str, str]]:
    counts = job.counts
    yield f"{counts['done']} of {counts['total']}", "items done"
    yield str(counts["failed"]), "items failed"
    if not job.runs or not job.seconds:
        return
    last = job.runs[-1]
    done = [one.item for run in job.runs for one in run.done]
    tokens = sum(job.tokens[item] for item in done if 0 <= item < len(job.tokens))
    yield duration(job.seconds), "on items" + (f", in {len(job.runs)} runs" if job.runs[1:] else "")
    yield f"{len(done) / job.seconds:.3g}", "items a second"
    yield quantity(tokens / job.seconds, "tok/s"), "on average"
    hosts = {rank.host for rank in last.ranks}
    yield counted(len(last.ranks), "rank"), f"on {counted(len(hosts), 'host')}"


def _what_ran(body: Element, job: Job) -> None:
    section = _section(body, "What ran")
    table(
        section,
        ("run", "began", "ranks", "hosts", "items done", "items failed", "took", "ended"),
        [
            (
                number + 1,
                datetime.fromtimestamp(run.zero).astimezone().isoformat(" ", "seconds"),
                len(run.ranks),
                _few(sorted({rank.host for rank in run.ranks})),
                len(run.done),
                len(run.failed),
                duration(run.until / 1e6),
                run.end,
            )
            for number, run in enumerate(job.runs)
        ],
    )
    facts = add(section, "dl")
    for words, value in _facts(job.runs[-1]):
        add(facts, "dt", words)
        add(facts, "dd", value)


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    about = run.about
    for key in ("command", "data", "backend", "device", "versions", "launcher"):
        if about.get(key):
            yield key, str(about[key])
    if about.get("strategies"):
        yield "strategy", ", ".join(about["strategies"])
    if about.get("groups"):
        yield "groups", "; ".join(about["groups"])
    devices = sorted({rank.device_name for rank in run.ranks if rank.device_name})
    if devices:
        yield "devices", _few(devices)
    seconds = about.get("seconds", {})
    if seconds:
        before = ", ".join(f"{name} {duration(took)}" for name, took in seconds.items())
        yield "before the first item", before


def _few(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _plan(body: Element, job: Job) -> None:
    """What was expected, beside what was measured of all runs together."""
    if job.plan is None:
        return
    section = _section(body, "Plan and measured")
    pieces = [run.about.get("seconds", {}).values() for run in job.runs]
    starting = sum(map(sum, pieces))
    plan, whole = job.plan, starting + job.seconds
    table(
        section,
        ("", "plan", "measured", "measured / plan"),
        [
            (words, duration(expected), duration(measured), _ratio(measured, expected))
            for words, expected, measured in (
                ("before the first item", plan.starting_seconds, starting),
                ("items", plan.seconds - plan.starting_seconds, job.seconds),
                ("launcher to the end", plan.seconds, whole),
            )
        ],
        numbers=3,
    )
    words = f"The plan: {counted(plan.ranks, 'rank')}, which wait for the {plan.waits_for}."
    if job.runs[1:]:
        words += f" Measured is the sum of {len(job.runs)} runs."
    if job.counts["todo"]:
        words += f" {counted(job.counts['todo'], 'item')} of it are still to be done."
    add(section, "p", words)


def _ratio(measured: float, expected: float) -> str:
    return f"{measured / expected:.2f}" if expected > 0 else ""


def _over_time(body: Element, job: Job) -> None:
    section = _section(body, "Items over time")
    progress_chart(section, job.runs, job.counts["total"])


def _run(body: Element, job: Job, number: int) -> None:
    """Where the time went in one run; earlier runs are folded up."""
    run, last = job.runs[number], number == len(job.runs) - 1
    several = f" in run {number + 1}" if job.runs[1:] else ""
    section = add(body, "section") if last else add(body, "details")
    add(section, "h2" if last else "summary", f"Where the time went{several}")
    words = verdict(run)
    if words:
        add(section, "p", words)
    rank_bars(section, run)
    table(
        section,
        ("thread", "phase", "slowest", "least", "mean", "most"),
        [
            (
                THREADS[each.thread],
                phase_of(each.thread, each.phase).words,
                f"rank {each.slowest.rank} on {each.slowest.host}",
                duration(each.least),
                duration(each.mean),
                duration(each.most),
            )
            for each in spreads(run)
        ],
        numbers=3,
    )


def _timeline(body: Element, job: Job) -> None:
    """The canvas that the script draws on, and what it draws."""
    section = _section(body, "Timeline")
    legend(section, job.runs[-1], ("main", "read", "write", "device"))
    add(section, "div", id="timeline")
    without = add(section, "noscript")
    add(without, "p", "The timeline needs JavaScript; everything else on this page doesn't.")
    data = add(section, "script", type="application/json", id="timeline-data")
    data.text = timeline_data(job.runs, job.name_of)
    for script in ("unpack.js", "timeline.js"):
        add(section, "script").text = _asset(script)


def _slowest(body: Element, job: Job) -> None:
    slow = slowest_items(job.runs, len(job.names))
    if not slow:
        return
    section = _section(body, "Slowest items")
    add(
        section,
        "p",
        "An item is read, computed and written while its neighbours are in another of these "
        "stages. These are the items with the longest stage on any rank.",
    )
    table(
        section,
        ("item", "stage", "where", "run", "tokens", "took"),
        [
            (
                job.name_of(each.item),
                each.stage,
                f"rank {each.rank} on {each.host}",
                each.run + 1,
                job.tokens[each.item],
                duration(each.seconds),
            )
            for each in slow
        ],
        numbers=3,
    )


def _failed(body: Element, job: Job) -> None:
    found = [number for number, why in enumerate(job.reasons) if why]
    if not found:
        return
    section = _section(body, "Failed items")
    rows = [(job.name_of(item), job.reasons[item]) for item in found[:MOST_FAILED]]
    table(section, ("item", "why"), rows)
    if len(found) > MOST_FAILED:
        add(section, "p", f"And {len(found) - MOST_FAILED} more.")
