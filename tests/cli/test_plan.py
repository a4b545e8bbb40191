"""``mdattn plan``: one screen, the command that it ends with, and what is refused."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.cli.plan import neighbours
from mdattn_mpi.dataset import open_output
from mdattn_mpi.planning.gpus import GPUS as GPUS_BY_NAME
from mdattn_mpi.problem import AttentionProblem
from tests.support.complaint import complaint
from tests.support.finished import finished

ROOT = Path(__file__).parents[2]
GPUS = ["--nodes", "1", "--gpus-per-node", "4", "--kernel", "cudnn"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mdattn_mpi.runner.speed.SECONDS", 0.01)
    monkeypatch.setattr("mdattn_mpi.runner.speed.PIECE", 1 << 20)
    assert main(["make-data", "d.h5", "--items", "6", "--lengths", "300:900", "--quiet"]) == 0
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["plan", "d.h5", "--json", *words]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("where", [GPUS, ["--nodes", "2", "--ranks-per-node", "2"]])
def test_it_fits_a_screen_and_says_everything(
    where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "d.h5", "-o", "out.h5", *where]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    text = "\n".join(lines)
    for said in ("time to the end", "waits for", "memory", "output", "groups", "disk:", "submit"):
        assert said in text
    noun = "GPUs" if "--gpus-per-node" in where else "ranks"
    assert all(f"{count} {noun}" in text for count in (2, 4, 8))


@pytest.mark.parametrize(
    "words",
    [
        GPUS,
        [*GPUS, "--lse", "--items", "item*", "--layout", "token_major", "--group-size", "2"],
        ["--nodes", "2", "--ranks-per-node", "2", "--cpus-per-rank", "3", "-o", "a b.h5"],
    ],
)
def test_submit_takes_the_command_that_it_ends_with(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "d.h5", *words]) == 0
    _, _, command = capsys.readouterr().out.partition("mdattn submit ")
    submit = shlex.split(command.replace("\\\n", ""))  # as a shell joins lines
    assert main(["submit", "--dry-run", *submit]) == 0
    script = capsys.readouterr().out
    assert f"--nodes={words[1]}" in script
    assert ("-b cpu" in script) == ("--gpus-per-node" not in words)
    for option in ("--lse", "--items", "--layout"):
        assert (option in script) == (option in words)
    assert f"--group-size {'2' if '--lse' in words else 'auto'}" in script


def test_more_gpus_and_the_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *GPUS)
    plans = found["plans"]
    assert isinstance(plans, list)
    assert [plan["ranks_per_node"] for plan in plans] == [2, 4, 8]
    assert found["asked"] == 1
    assert all(sum(plan["items_by_group_size"].values()) == 6 for plan in plans)
    assert main(["inspect", "d.h5", "--json"]) == 0
    tokens = sum(item["q_tokens"] for item in json.loads(capsys.readouterr().out)["items"])
    assert found["output_bytes"] == pytest.approx(tokens * 8 * 128 * 2, rel=0.02)


def test_only_what_is_left_of_an_output_counts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = {f"i{n}": AttentionProblem(n, n, 2, 1, 16, 16) for n in (40, 50, 60)}
    files = finished(folder, items)

    def left(*words: str) -> tuple[float, int, str]:
        assert main(["plan", str(files.data), "--json", *GPUS, *words]) == 0
        found = json.loads(capsys.readouterr().out)
        plan = found["plans"][1]
        seconds = plan["seconds"] - plan["starting_seconds"]
        return seconds, sum(plan["items_by_group_size"].values()), str(found["notes"])

    _, all_items, _ = left()
    done, none, notes = left("-o", str(files.output))
    assert (done, none, all_items) == (0, 0, 3)
    assert "0 of 3 items left to do" in notes
    with open_output(files.output, writable=True) as output:
        output.ledger.reopen(output.item("i60"))
    some, one, notes = left("-o", str(files.output))
    assert some > 0
    assert one == 1
    assert "1 of 3 items left to do" in notes
    (folder / "other.h5").write_bytes(b"x" * 100)
    assert main(["plan", str(files.data), *GPUS, "-o", "other.h5"]) == 2
    assert "other.h5" in complaint(capsys)


def test_half_and_double() -> None:
    assert neighbours(1, 1) == (None, (1, 2))
    assert neighbours(1, 4) == ((1, 2), (1, 8))
    assert neighbours(1, 8) == ((1, 4), (2, 8))
    assert neighbours(3, 4) == ((3, 2), (6, 4))
    assert neighbours(2, 8) == ((1, 8), (4, 8))


def test_a_file_of_kernel_times_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(*words: str) -> float:
        plans = planned(capsys, *GPUS, *words)["plans"]
        assert isinstance(plans, list)
        return float(plans[0]["seconds"])

    call = {"q_tokens": 900, "kv_tokens": 900, "head_dim": 128, "band": [None, None]}
    slow = {"results": [{"call": call, "sides": {"cuDNN": {"TFLOP/s": 0.0001}}}]}
    (folder / "slow.json").write_text(json.dumps(slow))
    assert seconds("--kernel-times", "slow.json") > seconds() + 1
    assert seconds("--kernel-times", str(ROOT / "docs" / "h200-kernels.json")) < 10


def test_gpus_that_nobody_measured_are_called_that(capsys: pytest.CaptureFixture[str]) -> None:
    for name, measured in (("a100", False), ("b200", False), ("h100", True), ("h200", True)):
        notes = planned(capsys, *GPUS, "--gpu", name)["notes"]
        assert ("never measured" in str(notes)) == (not measured)
    assert "none is here" in str(planned(capsys, *GPUS)["notes"])


def test_the_gpu_that_is_here_is_meant_unless_another_one_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a100 = GPUS_BY_NAME["a100"]
    here = {
        "gpu_count": lambda: 2,
        "gpu_name": lambda ordinal: "NVIDIA A100-SXM4-80GB",
        "gpu_sm": lambda ordinal: a100.sm,
        "gpu_attribute": lambda ordinal, which: a100.multiprocessors,
        "gpu_memory": lambda: a100.memory,
    }
    for name, answer in here.items():
        monkeypatch.setattr(f"mdattn_mpi.runner.prospect.{name}", answer)
    found, named, other = (
        planned(capsys, *GPUS, *words) for words in ((), ("--gpu", "a100"), ("--gpu", "h200"))
    )
    assert "NVIDIA A100-SXM4-80GB (the one here; never measured" in str(found["notes"])
    assert found["plans"] == named["plans"]
    assert "H200 SXM (asked for)" in str(other["notes"])


def test_what_does_not_fit_is_refused_for_what_was_asked_and_left_out_beside_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mdattn_mpi.planning import gpus

    small = gpus.GPUS["h100"]._replace(memory=9 << 20)
    monkeypatch.setitem(gpus.GPUS, "h100", small)
    assert main(["plan", "d.h5", "--nodes", "1", "--gpus-per-node", "1", "--gpu", "h100"]) == 2
    assert "start at least" in complaint(capsys)
    plans = planned(capsys, "--nodes", "1", "--gpus-per-node", "2", "--gpu", "h100")["plans"]
    assert isinstance(plans, list)
    assert [plan["ranks_per_node"] for plan in plans] == [2, 4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "1", "--gpu", "h100"], "--gpu without GPUs"),
        (["--nodes", "1", "--kernel-times", "x.json"], "--kernel-times without GPUs"),
        ([*GPUS, "--ranks-per-node", "4"], "--ranks-per-node with --gpus-per-node"),
        ([*GPUS, "--group-size", "3"], "can't be cut into groups of 3"),
        ([*GPUS, "--group-size", "x"], "group_size is 'x'"),
        ([*GPUS, "--kernel-times", "absent.json"], "no file of kernel times"),
        ([*GPUS, "--kernel", "flash", "--gpu", "a100"], "--kernel flash: not built for SM 8.0"),
        ([*GPUS, "--items", "nothing"], "nothing"),
        ([*GPUS, "-o", "d.h5"], "the output is the dataset itself"),
        ([*GPUS, "--model", "x.onnx"], "an ONNX model can't be planned"),
        ([*GPUS, "--model", "absent"], "name a local folder"),
    ],
)
def test_refusals(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "d.h5", *words]) == 2
    assert said in complaint(capsys)


def test_a_folder_that_cannot_be_tried_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    notes = planned(capsys, *GPUS, "-o", "absent/out.h5")["notes"]
    assert "couldn't be tried" in str(notes)


@pytest.mark.skipif(not find_spec("transformers"), reason="needs the extra transformers")
def test_a_model_over_token_ids(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.tiny_models import tiny_model

    words = ["--items", "6", "--lengths", "20:100", "--vocabulary", "96", "--quiet"]
    assert main(["make-data", "t.h5", *words]) == 0
    model = str(tiny_model("llama"))
    assert main(["plan", "t.h5", "--model", model, *GPUS, "--give", "embedding"]) == 0
    text = capsys.readouterr().out
    assert "LlamaModel" in text
    assert "--model" in text.partition("mdattn submit")[2]
    assert main(["plan", "d.h5", "--model", model, *GPUS]) == 2
    assert "input_ids" in complaint(capsys)
    assert main(["plan", "t.h5", "--model", model, *GPUS, "--give", "nothing"]) == 2
    assert "there is no nothing" in complaint(capsys)
