"""``mdattn verify``: what it says and its exit codes; outputs right, wrong and unfinished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.dataset import open_output
from mdattn_mpi.problem import AttentionProblem, Span
from mdattn_mpi.verifier.value_range import ValueRange
from tests.support.complaint import complaint
from tests.support.finished import finished
from tests.support.group import take

PROBLEMS = {
    "plain": AttentionProblem(300, 300, 4, 2, 32, 32),
    "causal": AttentionProblem(257, 257, 4, 4, 16, 24, dtype="float16", causal="upper_left"),
    "chunk": AttentionProblem(61, 203, 6, 1, 8, 8, causal="lower_right"),
}


@pytest.fixture
def files(tmp_path):
    return finished(tmp_path, PROBLEMS, ranks=3, lse=True)


def verify(files, *options):
    return main(["verify", str(files.output), "--data", str(files.data), *options])


def overwrite(files, name, spans, value, *, result="output", committed=False):
    """Put `value` there; with `committed`, the ledger's checksums fit."""
    with open_output(files.output, writable=True) as output:
        item = output.item(name)
        region = output.regions(item)[result]
        array = np.full((1, *region.shape[1:]), value, region.dtype)
        for span in spans:
            for row in range(span.start, span.stop):
                ((offset, _),) = region.runs([Span(row, row + 1)])
                os.pwrite(output._fd, array.tobytes(), offset)
        if committed:
            entry = output.ledger.entry(item)
            crc32s = [output.checksum(item, spans) for spans in entry.shards]
            output.ledger.commit(item, crc32s, entry.strategy, entry.shards)


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("options", [(), ("--all",), ("--rows", "0")], ids=" ".join)
def test_a_right_output(tmp_path, capsys, ranks, strategy, options):
    files = finished(tmp_path, PROBLEMS, ranks=ranks, strategy=strategy, seed=ranks)
    assert verify(files, *options) == 0
    shown = capsys.readouterr().out
    assert shown.count(" right") == 4
    assert f"{ranks}/{ranks}" in shown
    assert max(map(len, shown.splitlines())) <= max(80, len(str(files.output)) + 20)


def test_a_wrong_row_that_the_checksum_covers(files, capsys):
    overwrite(files, "causal", [Span(128, 129)], 0, committed=True)  # a border of the zigzag
    assert verify(files) == 1
    shown = capsys.readouterr()
    assert "row 128 of head" in shown.out
    assert "3/3     wrong" in shown.out
    assert "1 of 3 items are wrong" in " ".join(shown.err.split())
    assert "Fix:" in " ".join(shown.err.split())


def test_plausible_zeros(files, capsys):
    for name, problem in PROBLEMS.items():
        overwrite(files, name, [Span(0, problem.q_tokens)], 0, committed=True)
    assert verify(files) == 1
    assert "3 of 3 items are wrong" in complaint(capsys)


def test_bytes_that_changed_after_they_were_written(files, capsys):
    with open_output(files.output) as output:
        offset = output.regions(output.item("plain"))["output"].offset
    with open(files.output, "r+b") as raw:
        raw.seek(offset + 150 * 4 * 32 * 2 + 1)  # row 150 is in the shard of rank 1
        byte = raw.read(1)[0]
        raw.seek(-1, 1)
        raw.write(bytes([byte ^ 1]))
    assert verify(files, "--rows", "0", "--items", "plain") == 1
    shown = capsys.readouterr().out
    assert "the shard of rank 1 has other bytes than that rank wrote" in shown
    assert "2/3     wrong" in shown


def test_a_wrong_lse(files, capsys):
    overwrite(files, "chunk", [Span(60, 61)], 1.0, result="lse", committed=True)
    assert verify(files) == 1
    assert "the log-sum-exp's error is" in capsys.readouterr().out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_wrong(files, capsys, value):
    overwrite(files, "plain", [Span(299, 300)], value, committed=True)
    assert verify(files, "--json") == 1
    items = {item["item"]: item for item in json.loads(capsys.readouterr().out)["items"]}
    assert items["plain"]["verdict"] == "wrong"
    assert items["plain"]["used"] is None
    assert items["causal"]["verdict"] == "right"


def seen_by(files, capsys, *options):
    """The verdict on `causal`."""
    verify(files, "--items", "causal", "--json", *options)
    return json.loads(capsys.readouterr().out)["items"][0]["verdict"]


def change(files, change):
    """Let `change` have the output of `causal`, and write it back with checksums that fit."""
    with open_output(files.output, writable=True) as output:
        item = output.item("causal")
        entry, array, lse = (
            output.ledger.entry(item),
            output.read(item, "output"),
            output.read(item, "lse"),
        )
        change(array)
        crc32s = [
            output.write(item, spans, {"output": take(array, spans), "lse": take(lse, spans)})
            for spans in entry.shards
        ]
        output.ledger.commit(item, crc32s, entry.strategy, entry.shards)


def beyond_its_values(array):
    array[101, 2, 5] = 20


def nan(array):
    array[101, 2, 5] = np.nan


def another_heads(array):
    array[20, 2] = array[20, 3]


ELSEWHERE = ("--rows", "0")  # neither row 20 nor row 101 is at a border


@pytest.mark.parametrize("corruption", [beyond_its_values, nan, another_heads])
def test_what_no_row_can_hold_is_seen_without_comparing_it(files, capsys, monkeypatch, corruption):
    change(files, corruption)
    assert seen_by(files, capsys, *ELSEWHERE) == "wrong"
    assert verify(files, *ELSEWHERE) == 1
    shown = capsys.readouterr().out
    assert "not finite, or beyond the values that it sees" in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    # Nothing else sees it there.
    monkeypatch.setattr(ValueRange, "outside", lambda self, rows, output: np.zeros((1, 1), bool))
    assert seen_by(files, capsys, *ELSEWHERE) == "right"


def test_what_a_row_could_hold_is_seen_by_all_only(files, capsys):
    def its_mean_with_the_row_before(array):
        array[101] = array[100:102].astype(float).mean(axis=0)

    change(files, its_mean_with_the_row_before)
    assert seen_by(files, capsys, *ELSEWHERE) == "right"
    assert seen_by(files, capsys, "--all") == "wrong"


def poison(files, name, tensor, index):
    """Put a NaN into the dataset, and where it leads to into the output."""
    with h5py.File(files.data, "r+") as file:
        data = file[f"items/{name}/{tensor}"]
        data[index] = 0x7FC0 if data.dtype == np.uint16 else np.nan


@pytest.mark.parametrize("output", ["nan", "as if it were not there"])
def test_an_item_that_cannot_be_judged_is_not_right(files, capsys, output):
    for head in range(2):
        poison(files, "plain", "key", (0, head, 3))
    if output == "nan":
        overwrite(files, "plain", [Span(0, 300)], np.nan, committed=True)
    assert verify(files, "--other-data") == 1
    shown = capsys.readouterr()
    assert " not judged\n" in shown.out
    assert "3 items, 2 right, 1 not judged" in shown.out
    assert "nan" not in shown.out
    assert "1 of 3 items could not be judged" in " ".join(shown.err.split())
    assert verify(files, "--other-data", "--json") == 1
    assert json.loads(capsys.readouterr().out)["not_judged"] == 1


def test_rows_that_cannot_be_judged_are_counted(files, capsys):
    poison(files, "causal", "query", (256, 1, 3))
    assert verify(files, "--other-data", "--rows", "0") == 0
    assert "1 of 48 rows × heads not judged" in capsys.readouterr().out


def test_unfinished_items_are_named_and_may_be_let_pass(files, capsys):
    with open_output(files.output, writable=True) as output:
        output.ledger.fail(output.item("causal"), "the key holds 3 NaN")
        states = output.ledger.columns["state"].offset
        os.pwrite(output._fd, b"\0", states + output.item("chunk").index)
    assert verify(files) == 1
    shown = capsys.readouterr()
    assert shown.out.count(" unfinished\n") == 3
    assert "failed: the key holds 3 NaN" in shown.out
    assert "has not been computed" in shown.out
    assert "2 of 3 items aren't finished" in " ".join(shown.err.split())
    assert verify(files, "--partial") == 0
    assert verify(files, "--items", "plain") == 0


def test_json_says_the_same(files, capsys):
    assert verify(files, "--json", "--rows", "5", "--seed", "7") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["right"], found["wrong"], found["unfinished"], found["exit_code"]) == (3, 0, 0, 0)
    for item in found["items"]:
        assert item["strategy"] == "ring"
        assert item["ranks"] == 3
        assert 0 < item["used"] < 1
        assert 0 < item["error"] < item["tolerance"]
        assert 0 < item["lse_used"] < 1


def test_items_are_selected_by_patterns(files, capsys):
    assert verify(files, "--items", "c*") == 0
    shown = capsys.readouterr().out
    assert "chunk" in shown
    assert "causal" in shown
    assert "plain" not in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--items", "nothing*"), "no item matches 'nothing*'"),
        (("--data", "missing.h5"), "missing.h5"),
        (("--data", "OUTPUT"), "format is 'mdattn-output'"),
    ],
)
def test_what_is_refused(files, capsys, options, says):
    options = [str(files.output) if option == "OUTPUT" else option for option in options]
    assert verify(files, *options) == 2
    shown = complaint(capsys)
    assert says in shown
    assert "Fix:" in shown


def test_the_dataset_that_the_output_names(files, capsys):
    with open_output(files.output) as output:
        named = output.attributes["input_path"]
    assert os.path.samefile(named, files.data)
    assert main(["verify", str(files.output)]) == 0
    os.rename(files.data, f"{files.data}.moved")
    assert main(["verify", str(files.output)]) == 2
    assert "name the dataset: --data" in complaint(capsys)
    assert main(["verify", str(files.output), "--data", f"{files.data}.moved"]) == 0


def test_another_dataset_of_the_same_shapes_is_refused(files, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other = finished(tmp_path / "other", PROBLEMS, seed=99)
    mixed = files._replace(data=other.data)
    assert verify(mixed) == 2
    assert "is not the dataset that" in complaint(capsys)
    assert verify(mixed, "--other-data") == 1
    assert "3 of 3 items are wrong" in complaint(capsys)


def test_a_dataset_with_another_mask_is_refused(files, capsys):
    with h5py.File(files.data, "r+") as file:
        file["items/plain"].attrs["causal"] = "upper_left"
    assert verify(files, "--other-data") == 2
    assert f"was made for {PROBLEMS['plain']}" in complaint(capsys)


def test_a_truncated_output_is_refused(files, capsys):
    os.truncate(files.output, files.output.stat().st_size // 2)
    assert verify(files) == 2
    assert str(files.output) in complaint(capsys)


def test_sixteen_bit_weights_are_allowed_to_a_gpu_only(tmp_path, capsys):
    """An error that tensor cores may make, in an output that says it was made on the CPU."""
    problem = replace(PROBLEMS["plain"], kv_tokens=2000)
    files = finished(tmp_path, {"plain": problem})
    with open_output(files.output) as output:
        right = output.read(output.item("plain"), "output")
    noise = np.random.default_rng(1).standard_normal(right.shape) * 0.004
    with open_output(files.output, writable=True) as output:
        out = (right.astype(float) * (1 + noise)).astype(right.dtype)
        item = output.item("plain")
        shards = ((Span(0, 300),),)
        output.ledger.commit(item, [output.write(item, shards[0], {"output": out})], "ring", shards)
    assert verify(files) == 1
    assert verify(files, "--backend", "cuda") == 0


def test_never_imports_what_it_judges(files):
    script = (
        "import sys; from mdattn_mpi.cli import main; main(sys.argv[1:]);"
        "print([m for m in sys.modules if m.startswith(('mdattn_mpi.strategies',"
        " 'mdattn_mpi.devices', 'mdattn_mpi.backends', 'mdattn_mpi.trt',"
        " 'mpi4py', 'tensorrt', 'cudnn', 'cuda'))])"
    )
    command = ["verify", str(files.output), "--data", str(files.data)]
    run = [sys.executable, "-c", script, *command]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
