"""``mdattn bench predict`` from a file of kernel times, without measuring anything."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from mdattn_mpi.bench.timeline import Call, calls, trace
from mdattn_mpi.problem import FLAT_STRATEGIES, AttentionProblem, Plan
from mdattn_mpi.strategies import STRATEGIES
from tests.support.mpirun import mpirun


def kernels(path: Path, tokens: int, ranks: int, bandwidth: float) -> None:
    """Times of an engine that does a query–key pair of a head in 0.1 ns."""
    found: set[Call] = set()
    problem = AttentionProblem(tokens, tokens, 8, 8, 128, 128)
    for count in (1, ranks):
        for name in FLAT_STRATEGIES:
            found |= calls(trace(Plan(problem, name, count), STRATEGIES[name]))
    times = [{"call": c, "seconds": c.q_rows * c.kv_rows * c.q_heads * 1e-10} for c in found]
    rates = {"bandwidth": bandwidth, "latency": 0.0, "memory": 1e15}
    path.write_text(json.dumps({"attend": times, **rates}))


@pytest.mark.parametrize("bandwidth", [1e15, 1e10])
def test_shares_follow_from_the_file(bandwidth: float, tmp_path: Path) -> None:
    path, tokens, ranks = tmp_path / "kernels.json", 2048, 4
    kernels(path, tokens, ranks, bandwidth)
    before = path.read_bytes()
    options = f"--ranks {ranks} --lengths {tokens} --causal none --json".split()
    done = mpirun(
        1, ["-m", "mdattn_mpi", "bench", "predict", "--kernels", str(path), *options], check=True
    )
    assert path.read_bytes() == before
    rows = {row["strategy"]: row for row in json.loads(done.stdout)["rows"]}
    compute = tokens * tokens * 8 * 1e-10
    gather = 3 * (tokens // ranks) * 8 * 256 * 2 / bandwidth
    assert rows["allgather"]["seconds"] == pytest.approx(compute / ranks + gather, rel=1e-4)
    hops = max(compute / ranks**2, gather / 3)
    assert rows["ring"]["seconds"] == pytest.approx(3 * hops + compute / ranks**2, rel=1e-4)
    assert all(row["alone_seconds"] == pytest.approx(compute, rel=1e-6) for row in rows.values())
    if bandwidth == 1e15:
        assert all(row["share"] == pytest.approx(1, rel=1e-3) for row in rows.values())
    else:
        assert rows["allgather"]["batch_share"] > rows["allgather"]["share"]


def test_measured_rows_stand_beside_predicted_ones(tmp_path: Path) -> None:
    path, measured, tokens = tmp_path / "kernels.json", tmp_path / "measured.json", 2048
    kernels(path, tokens, 2, 1e15)
    compute = tokens * tokens * 8 * 1e-10
    problem = asdict(AttentionProblem(tokens, tokens, 8, 8, 128, 128))
    ms = {"one GPU": 1.1, "ring": 0.5, "allgather": 0.625, "ulysses": 1, "stream of allgather": 0.5}
    sides = {name: {"ms": 1e3 * compute * share} for name, share in ms.items()}
    rows = {"ranks": 2, "results": [{**problem, "sides": sides}], "facts": {}}
    measured.write_text(json.dumps(rows))
    options = f"--ranks 2 --lengths {tokens} --causal none --kernels {path}".split()
    command = ["-m", "mdattn_mpi", "bench", "predict", *options, "--against", str(measured)]
    found = json.loads(mpirun(1, [*command, "--json"], check=True).stdout)["rows"]
    shares = {row["strategy"]: row["measured_share"] for row in found}
    assert shares == pytest.approx({"ring": 1.1, "allgather": 0.88, "ulysses": 0.55})
    (gathered,) = (row for row in found if row["strategy"] == "allgather")
    assert gathered["measured_batch_share"] == pytest.approx(1.1)
    table = mpirun(1, command, check=True).stdout
    assert re.search(r" allgather .* 2\.097\s+1\.136\s+0\.909", table), table


@pytest.mark.parametrize("text", ["", "[]", '{"results": [{}], "ranks": 2}'])
def test_what_holds_no_measured_rows_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(text)
    command = f"bench predict --kernels {tmp_path}/k.json --against {path}".split()
    done = mpirun(1, ["-m", "mdattn_mpi", *command])
    assert done.returncode == 2
    assert "no measured rows" in done.stderr
    assert str(path) in done.stderr
