"""The benchmarks measure what they say; figures themselves aren't tested."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from mdattn_mpi.bench.attention_cpu import causal_cost
from mdattn_mpi.bench.measure import alternate
from mdattn_mpi.bench.options import add_shapes, one_problem, problems
from mdattn_mpi.cli import main
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem
from tests.support.mpirun import mpirun


def test_sides_alternate_the_first_round_does_not_count_and_medians_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    now = 0.0
    monkeypatch.setattr("mdattn_mpi.bench.measure.perf_counter", lambda: now)

    def side(name: str, seconds: list[float]) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            calls.append(name)
            now += seconds[calls.count(name) - 1]

        return run

    def before() -> None:
        nonlocal now
        now += 100.0

    kinds = {"ours": side("ours", [9, 1, 2, 30]), "theirs": side("theirs", [9, 5, 7, 6])}
    assert alternate(kinds, 3, before=before) == {"ours": 2, "theirs": 6}
    assert calls == ["ours", "theirs", "theirs", "ours"] * 2
    with pytest.raises(RejectedError, match="0 rounds"):
        alternate(kinds, 0)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_shapes(parser, lengths=(64, 32), q_heads=4, kv_heads=2, head_dims=(8,), causal="both")
    return parser.parse_args(argv)


def test_all_combinations_and_what_causal_costs() -> None:
    found = list(problems(parse("--dtype", "both")))
    assert len(set(found)) == 8
    assert {problem.causal for problem in found} == {"none", "upper_left"}
    results = [
        {**asdict(problem), "ours": problem.q_tokens * (1 if problem.causal == "none" else 0.5)}
        for problem in found
    ]
    assert list(causal_cost(results).values()) == [0.5] * 4


def test_a_benchmark_of_one_shape_takes_one() -> None:
    only = one_problem(parse("--length", "48", "--head-dim", "16", "--causal", "--dtype", "fp16"))
    assert only == AttentionProblem(48, 48, 4, 2, 16, 16, "float16", "upper_left")
    with pytest.raises(RejectedError, match="4 shapes"):
        one_problem(parse())


def test_without_pytorch_the_message_says_how_to_get_it() -> None:
    """A finder that refuses torch stands before all others."""
    code = """
import sys
sys.modules["torch"] = None
from mdattn_mpi.cli import main
sys.exit(main(["bench", "attention"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 2
    assert "[bench]" in run.stderr


@pytest.mark.skipif(not find_spec("torch"), reason="PyTorch isn't installed")
def test_attention_against_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "attention", "--lengths", "96", "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["results"]) == 8
    assert all(result["ratio"] > 0 < result["exp_gain"] for result in report["results"])
    assert report["facts"]["threads"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads need two cores")
def test_ranks_against_threads() -> None:
    argv = [
        "bench",
        "ranks",
        "--length",
        "200",
        "--head-dim",
        "16",
        "--rounds",
        "1",
        "--causal",
        "--json",
    ]
    run = mpirun(2, ["-m", "mdattn_mpi", *argv], check=True)
    report = json.loads(run.stdout)
    assert set(report["speed"]) == {"ring", "allgather"}
    assert all(row["ranks"] > 0 and row["threads"] > 0 for row in report["speed"].values())


def test_how_an_engine_reaches_all_ranks() -> None:
    argv = ["bench", "broadcast", "--mib", "3", "--rounds", "2", "--json"]
    found = json.loads(mpirun(3, ["-m", "mdattn_mpi", *argv], check=True).stdout)
    assert (found["ranks"], found["mib"]) == (3, 3)
    assert all(found[f"{name}_gib_per_s"] > 0 for name in ("ours", "mpi_new_memory"))


@pytest.mark.parametrize("ranks", [1, 3])
def test_memory_of_a_rank(ranks: int) -> None:
    argv = ["bench", "memory", "--length", "6000", "--head-dim", "64", "--json"]
    run = mpirun(ranks, ["-m", "mdattn_mpi", *argv], check=True)
    rows = json.loads(run.stdout)["bytes"]
    assert [row["shards"] for row in rows] == [2 * 2 * 64 * 6000 // ranks] * ranks
    assert all(row["peak"] >= row["shards"] * min(3, ranks) for row in rows)


def test_the_whole_job_against_its_parts(tmp_path: Path) -> None:
    options = (
        "--items 3 --lengths 96,64 --q-heads 4 --kv-heads 2 --head-dim 16 --group-sizes 1,auto "
        f"--folder {tmp_path}"
    )
    done = mpirun(
        2, ["-m", "mdattn_mpi", "bench", "job", "-b", "cpu", *options.split(), "--json"], check=True
    )
    found = json.loads(done.stdout)
    parts = {name: found["seconds"][name] for name in ("reading", "computing", "writing")}
    assert all(seconds > 0 for seconds in parts.values())
    assert set(found["groups"]) == {"1", "auto"}
    assert found["computing"] == pytest.approx(
        found["seconds"]["computing"] / found["seconds"]["kernels"], rel=1e-6
    )
    assert found["slowest"] == max(parts, key=parts.__getitem__)
    assert found["ratio"] == pytest.approx(
        found["seconds"]["whole job"] / max(parts.values()), rel=1e-6
    )
    assert not list(tmp_path.iterdir())
