"""``mdattn doctor``: every fault it knows, planted for real and found in the right line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.mpirun import ROOT, environment, mpirun

# What a rank does before it becomes the doctor: rank 1 alone, or all of them.
PLANT = """
import os, resource, sys
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
doctor = [sys.executable, "-m", "mdattn_mpi", "doctor", *sys.argv[1:]]
{plant}
os.execvp(doctor[0], doctor)
"""


def lines_of(text: str, check: str) -> list[str]:
    """The lines of a check."""
    lines = [line for line in text.splitlines() if line[6:].startswith(f"{check} ")]
    assert lines, f"no line about {check} in\n{text}"
    return lines


def examine(
    plant: str, *options: str, ranks: int = 2, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and report of a doctor under mpirun."""
    done = mpirun(ranks, ["-c", PLANT.format(plant=plant), *options], env=env)
    return done.returncode, done.stdout + done.stderr


def judged(
    *expected: tuple[str, ...], plant: str = "", options: Sequence[str] = (), ranks: int = 2,
    env: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Plant faults; each is found: check, level, and words that one line of it holds."""
    code, text = examine(plant, *options, ranks=ranks, env=env)
    for check, level, *words in expected:
        fitting = [
            line
            for line in lines_of(text, check)
            if line.startswith(level) and all(word in line for word in words)
        ]
        assert fitting, f"no {check} {level} {words} in\n{text}"
        assert fitting[0].startswith("OK") or "Fix: " in fitting[0]
    levels = {line.split()[0] for line in text.splitlines() if line}
    assert code == (2 if "FAIL" in levels else 1 if "WARN" in levels else 0), text


def test_a_healthy_machine(tmp_path: Path) -> None:
    judged(
        ("launcher", "OK", "2 ranks on 1 node"), ("MPI library", "OK"), ("versions", "OK"),
        ("environment", "OK"), ("open files", "OK"), ("stack", "OK"), ("locked memory", "OK"),
        ("/dev/shm", "OK"), ("clocks", "OK"), ("GPUs", "OK", "no GPU: the cpu backend"),
        ("all-reduce MPI", "", "/s a rank"), ("all-to-all MPI", "", "/s a rank"),
        ("shared file", "", "B/s"), options=["--folder", str(tmp_path)],
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_alone_and_as_json(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mdattn_mpi", "doctor", "--json", "--folder", str(tmp_path)],
        env=environment(), text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    checks = {finding["check"]: finding["level"] for finding in report["findings"]}
    assert checks["launcher"] == "OK"
    assert done.returncode == (2 if "FAIL" in checks.values() else "WARN" in checks.values())
    assert report["ranks"][0]["folder"]["path"] == str(tmp_path)


def test_a_launcher_of_another_mpi() -> None:
    env = environment({"PMI_RANK": "0", "PMI_SIZE": "4"})
    done = subprocess.run(
        [sys.executable, "-m", "mdattn_mpi", "doctor"],
        env=env, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = lines_of(done.stdout, "launcher")
    assert line.startswith("FAIL")
    assert "started 4 processes, but each is alone" in line
    assert "mpirun that belongs to" in line


def test_no_mpi_library() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mdattn_mpi", "doctor"],
        env=environment({"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}),
        text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert lines_of(done.stdout, "MPI library")[0].startswith("FAIL")
    assert "/nowhere/libmpi.so" in done.stdout


def test_a_rank_that_is_not_like_the_others(tmp_path: Path) -> None:
    old = tmp_path / "h5py-1.2.3.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: h5py\nVersion: 1.2.3\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() - 100\n"
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "libnccl.so.2").touch()
    (tmp_path / "ompi.4194305").mkdir()  # more than the largest pid that Linux gives
    plant = f"""
os.sched_setaffinity(0, {{0}})
os.environ["TMPDIR"] = "{tmp_path}"
os.environ["SLURM_NTASKS"] = "8"
if rank == 1:
    os.environ["PYTHONPATH"] = "{tmp_path}:" + os.environ["PYTHONPATH"]
    os.environ["NCCL_DEBUG"] = "INFO"
    os.environ["LD_LIBRARY_PATH"] = "{tmp_path}/one:{tmp_path}/two"
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))
"""
    judged(
        ("launcher", "WARN", "gave the job 8 tasks"),
        ("versions", "FAIL", "h5py", "1.2.3 on rank 1", "one environment"),
        ("environment", "WARN", "NCCL_DEBUG: unset on rank 0"),
        ("cores", "WARN", "2 ranks share 1 of"),
        ("open files", "WARN", "200 on rank 1", "ulimit -n"),
        ("stack", "WARN", "1 MiB on rank 1", "ulimit -s"),
        ("mpirun", "WARN", "1 killed on all ranks", f"rm -r {tmp_path}/ompi.4194305"),
        ("clocks", "WARN", "rank 1", "100 s behind rank 0"),
        ("libnccl", "WARN", f"{tmp_path}/one/libnccl.so.2, {tmp_path}/two", "LD_LIBRARY_PATH"),
        plant=plant,
    )


def test_settings_and_nodes(tmp_path: Path) -> None:
    plant = """
os.environ.update(
    SLURMD_NODENAME=f"n{rank // 2}", NCCL_SOCKET_IFNAME="ib7", NCCL_P2P_DISABLE="1"
)
"""
    judged(
        ("launcher", "WARN", "unevenly: from 1 to 2"),
        ("environment", "FAIL", "NCCL_SOCKET_IFNAME=ib7"),
        ("environment", "WARN", "NCCL_P2P_DISABLE is set"),
        ("folder", "WARN", "which one node has for itself"),
        plant=plant, ranks=3, options=["--folder", str(tmp_path)],
    )  # fmt: skip


def test_no_folder(tmp_path: Path) -> None:
    judged(
        ("folder", "FAIL", "isn't there"),
        ("environment", "OK", "NCCL_SOCKET_IFNAME"),
        plant="os.environ['NCCL_SOCKET_IFNAME'] = '=lo'", options=["--folder", f"{tmp_path}/none"],
    )  # fmt: skip


# -- mounts of its own, which take root -----------------------------------------------------------


def _can_mount() -> bool:
    if os.geteuid() or not shutil.which("unshare"):
        return False
    return not subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True, timeout=20, check=False,
    ).returncode  # fmt: skip


mounts = pytest.mark.skipif(not _can_mount(), reason="mounting takes root and mount namespaces")
MOUNTED = """
if {condition}:
    doctor = ["unshare", "-m", "sh", "-c", '{mount} && exec "$@"', "sh", *doctor]
"""


@mounts
def test_little_room(tmp_path: Path) -> None:
    mount = "mount -t tmpfs -o size=40m tmpfs /dev/shm"
    mount += f" && mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    judged(
        ("/dev/shm", "WARN", "this rank", "--shm-size"),
        ("folder", "WARN", "left", "make room"),
        ("shared file", "FAIL", "No space left on device"),
        plant=MOUNTED.format(condition="True", mount=mount), ranks=1,
        options=["--folder", str(tmp_path)],
    )  # fmt: skip


@mounts
def test_a_read_only_folder(tmp_path: Path) -> None:
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path}"
    judged(
        ("folder", "FAIL", "can't be written on rank 1"),
        plant=MOUNTED.format(condition="rank == 1", mount=mount),
        options=["--folder", str(tmp_path)],
    )


@mounts
def test_a_folder_that_only_looks_shared(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs tmpfs {tmp_path}"
    judged(
        ("shared file", "FAIL", "rank 1", "doesn't see the file of rank 0"),
        plant=MOUNTED.format(condition="rank == 1", mount=mount),
        options=["--folder", str(tmp_path)],
    )


# -- GPUs of a driver that is made up -------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the loader finds a driver with two GPUs."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = ROOT / "tests" / "support" / "fake_driver.c"
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    return {"LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}


def test_a_gpu_for_each_rank(driver: dict[str, str]) -> None:
    judged(
        ("GPUs", "OK", "2 × Fake GPU, one for each rank"), ("peers", "OK", "nvlink"),
        ("GPU kind", "OK", "SM 9.0: cuda"), ("driver", "OK", "13.0"), env=driver,
    )  # fmt: skip


def test_two_ranks_on_one_gpu(driver: dict[str, str]) -> None:
    plant = "os.environ['FAKE_GPUS'] = '1'"
    judged(("GPUs", "FAIL", "share one GPU", "1 GPUs visible"), plant=plant, env=driver)


def test_gpus_per_task(driver: dict[str, str]) -> None:
    plant = "os.environ.update(FAKE_GPUS='1', FAKE_UUID=str(1 + rank))"
    judged(("GPUs", "WARN", "not --gpus-per-task"), plant=plant, env=driver)


def test_a_rank_without_a_gpu(driver: dict[str, str]) -> None:
    plant = "if rank == 1: os.environ['CUDA_VISIBLE_DEVICES'] = ''"
    judged(("GPUs", "FAIL", "no GPU on rank 1"), plant=plant, env=driver)


def test_mixed_gpus_that_can_not_work_together(driver: dict[str, str]) -> None:
    plant = """
os.environ["FAKE_PEERS"] = "no"
if rank == 1:
    os.environ.update(FAKE_SM="80", FAKE_DRIVER="12040")
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
"""
    judged(
        ("GPU kind", "WARN", "SM 9.0 on rank 0", "SM 8.0 on rank 1"),
        ("driver", "WARN", "13.0 on rank 0", "12.4 on rank 1"),
        ("peers", "WARN", "can't reach"),
        ("locked memory", "WARN", "ulimit -l"),
        plant=plant, env=driver,
    )  # fmt: skip


def test_gpus_without_the_packages(driver: dict[str, str]) -> None:
    from mdattn_mpi.devices.presence import PACKAGES, _importable

    if all(map(_importable, PACKAGES)):
        pytest.skip("the packages are there")
    plant = "os.environ['FAKE_UUID'] = str(1 + 2 * rank)"
    judged(("NCCL", "WARN", "not installed"), plant=plant, env=driver)
