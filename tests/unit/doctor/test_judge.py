"""What facts mean: those that no test machine can be made to have."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.doctor.facts import gather_facts
from mdattn_mpi.doctor.filesystem import BLOCK, mount_of, stripes
from mdattn_mpi.doctor.finding import Finding, by_value, exit_code, who
from mdattn_mpi.doctor.judge import judge
from mdattn_mpi.doctor.trials import judge_folder, judge_rates

HOSTS = ["n1", "n1", "n2", "n2"]


@pytest.fixture
def ranks(tmp_path: Path) -> list[dict[str, Any]]:
    """Four ranks on two healthy nodes with a parallel file system."""
    facts = gather_facts(str(tmp_path))
    facts["folder"].update(type="lustre", stripes=4, free=1 << 40)
    facts.update(
        cores=list(range(8)),
        siblings=list(range(8)),
        all_cores=8,
        clock=0.0,
        launcher="srun of Slurm",
    )
    facts.update(mpi={"library": "Open MPI v5.0.11", "threads": True}, settings={}, slurm={})
    facts["limits"] = {"memlock": -1, "nofile": 1 << 16, "stack": 8 << 20}
    facts["shm"] = {"size": 1 << 40, "free": 1 << 40}
    facts["nccl"] = []
    facts["sessions"] = []
    facts["gpus"] = {"count": -1, "visible": None, "nodes": 0}
    return [
        {**copy.deepcopy(facts), "node": host, "local_rank": rank % 2, "local_size": 2}
        for rank, host in enumerate(HOSTS)
    ]


def lines(ranks: list[dict[str, Any]], check: str) -> list[Finding]:
    return [finding for finding in judge(ranks) if finding.check == check]


def test_healthy_nodes(ranks: list[dict[str, Any]]) -> None:
    assert {finding.level for finding in judge(ranks)} == {"OK"}
    assert "4 ranks on 2 nodes" in lines(ranks, "launcher")[0].what
    assert "4 stripes" in lines(ranks, "folder")[0].what


@pytest.mark.parametrize(
    ("version", "level", "words"),
    [
        ("11.0.0.114", "WARN", "FP16 accumulation"),
        ("11.3.0", "OK", "way round fused collective"),
        ("10.9", "OK", "without faults that are known"),
    ],
)
def test_tensorrt_that_is_known_for_faults(
    ranks: list[dict[str, Any]], version: str, level: str, words: str
) -> None:
    assert not lines(ranks, "TensorRT")
    for rank in ranks:
        rank["packages"]["tensorrt"] = version
    (finding,) = lines(ranks, "TensorRT")
    assert (finding.level, words in finding.what) == (level, True)


@pytest.mark.parametrize(("files", "level"), [(39, "FAIL"), (64, "WARN"), (4096, "OK")])
def test_open_files(ranks: list[dict[str, Any]], files: int, level: str) -> None:
    ranks[1]["limits"]["nofile"] = files
    assert [finding.level for finding in lines(ranks, "open files")] == [level]


@pytest.mark.parametrize(("gpus", "level"), [(-1, "WARN"), (2, "FAIL")])
def test_shared_memory(ranks: list[dict[str, Any]], gpus: int, level: str) -> None:
    ranks[3]["shm"]["free"] = 1 << 20
    ranks[3]["gpus"]["count"] = gpus
    (finding,) = lines(ranks, "/dev/shm")
    assert (finding.level, "1 MiB free on rank 3 (n2)" in finding.what) == (level, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cores": [0], "siblings": [0]}, "2 ranks share 1 of 8 hardware threads of n1"),
        (
            {"cores": [0, 1], "siblings": [0, 0]},
            "2 ranks share 1 core with 2 of 8",
        ),
        ({"settings": {"OMP_NUM_THREADS": "5"}}, "OMP_NUM_THREADS=5 on all ranks: more"),
    ],
)
def test_cores_that_are_not_enough(
    ranks: list[dict[str, Any]], changes: dict[str, Any], words: str
) -> None:
    for rank in ranks:
        rank.update(copy.deepcopy(changes))
    (finding,) = lines(ranks, "cores")
    assert finding.level == "WARN"
    assert words in finding.what


def test_one_stripe(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        rank["folder"]["stripes"] = 1
    (finding,) = lines(ranks, "folder")
    assert finding.level == "WARN"
    assert finding.fix.startswith("lfs setstripe -c -1 /")


@pytest.mark.parametrize(("kind", "words"), [("nfs4", "slowly"), ("xfs", "for itself")])
def test_file_systems_that_nodes_do_not_share_well(
    ranks: list[dict[str, Any]], kind: str, words: str
) -> None:
    for rank in ranks:
        rank["folder"].update(type=kind, stripes=None)
    (finding,) = lines(ranks, "folder")
    assert (finding.level, words in finding.what) == ("WARN", True)


def test_gpus_that_the_driver_hides(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[2:]:
        rank["gpus"].update(nodes=2, count=0, visible="")
    (finding,) = lines(ranks, "GPUs")
    assert finding.level == "FAIL"
    assert "ranks 2, 3 (n2)" in finding.what
    assert "CUDA_VISIBLE_DEVICES=''" in finding.what


def test_mpi_that_threads_may_not_call(ranks: list[dict[str, Any]]) -> None:
    ranks[3]["mpi"]["threads"] = False
    (finding,) = lines(ranks, "MPI library")
    assert (finding.level, "rank 3 (n2)" in finding.what) == ("WARN", True)


def test_two_mpi_libraries(ranks: list[dict[str, Any]]) -> None:
    ranks[3]["mpi"]["library"] = "MPICH 4.3"
    (finding,) = lines(ranks, "MPI library")
    assert finding.level == "FAIL"
    assert "MPICH 4.3 on rank 3 (n2)" in finding.what


@pytest.mark.parametrize(
    ("library", "last", "level", "words"),
    [
        ("MPI", {"right": True, "rate": 5e9}, "OK", "5 GB/s a rank"),
        ("MPI", {"right": False, "rate": 5e9}, "FAIL", "wrong values on rank 3 (n2)"),
        ("NCCL", {"right": True, "rate": 1e6}, "WARN", "1 MB/s a rank"),
    ],
)
def test_collectives(library: str, last: dict[str, Any], level: str, words: str) -> None:
    good = {"right": True, "rate": 5e9}
    tries = [{"all-reduce": good, "all-to-all": rank} for rank in (good, good, good, last)]
    first, second = judge_rates(library, tries, HOSTS)
    assert (first.check, first.level) == (f"all-reduce {library}", "OK")
    assert (second.check, second.level, second.what) == (f"all-to-all {library}", level, words)


def tried(**changes: Any) -> list[dict[str, Any]]:
    good = {"error": "", "shared": True, "right": True, "locks": ""}
    fast = {"write_seconds": 0.01, "read_seconds": 0.01}
    return [{**good, **fast} for _ in HOSTS[:3]] + [{**good, **fast, **changes}]


@pytest.mark.parametrize(
    ("changes", "check", "level", "words"),
    [
        ({}, "shared file", "OK", f"written at {BLOCK * 4 / 1e7:.3g} GB/s"),
        ({"right": False}, "shared file", "FAIL", "reads other bytes"),
        ({"shared": False}, "shared file", "FAIL", "doesn't see"),
        ({"error": "Quota exceeded"}, "shared file", "FAIL", "Quota exceeded on rank 3"),
        ({"write_seconds": 60.0}, "shared file", "WARN", "written at 559 kB/s"),
        ({"locks": "No locks available"}, "file locks", "WARN", "No locks available on rank 3"),
    ],
)
def test_shared_files(changes: dict[str, Any], check: str, level: str, words: str) -> None:
    found = {finding.check: finding for finding in judge_folder(tried(**changes), HOSTS)}
    assert found[check].level == level
    assert words in found[check].what


def test_mount_points(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:5 / /scratch rw shared:1 - lustre mds:/scratch rw\n"
        "3 2 0:6 / /scratch/with\\040space rw - tmpfs tmpfs rw\n"
    )
    assert mount_of(Path("/home/me"), mounts) == ("/", "ext4")
    assert mount_of(Path("/scratch/me"), mounts) == ("/scratch", "lustre")
    assert mount_of(Path("/scratchy"), mounts) == ("/", "ext4")
    assert mount_of(Path("/scratch/with space"), mounts) == ("/scratch/with space", "tmpfs")


def test_stripes_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    lfs = tmp_path / "lfs"
    lfs.write_text('#!/bin/sh\n[ "$*" = "getstripe -d -c /scratch" ] && echo 8\n')
    lfs.chmod(0o755)
    assert stripes(Path("/scratch")) == 8
    assert stripes(Path("/other")) is None


def test_words() -> None:
    assert who([0, 1, 2, 3], HOSTS) == "all ranks"
    assert who([0], ["n1"]) == "this rank"
    assert who([2], HOSTS) == "rank 2 (n2)"
    assert (
        who(range(8), [f"n{node}" for node in range(99)]) == "ranks 0, 1, 2, 3, … (n0, n1, n2, …)"
    )
    assert by_value(["a", "a", "b", "a"], HOSTS) == "a on ranks 0, 1, 3 (n1, n2); b on rank 2 (n2)"


def test_exit_codes() -> None:
    good, warning, failure = (Finding("x", level, "") for level in ("OK", "WARN", "FAIL"))  # type: ignore[arg-type]
    assert exit_code([good]) == 0
    assert exit_code([good, warning]) == 1
    assert exit_code([warning, failure, good]) == 2
