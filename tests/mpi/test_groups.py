"""Groups of ranks: the same bytes whoever does an item, resumed, stopped, and with failures."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from mdattn_mpi.cli import main
from tests.support.mpirun import kill_all, mark_of, mpirun, processes, start
from tests.support.storm import done, results

ITEMS = 9
RUN = ("-b", "cpu", "--threads", "1", "--lse")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items of very different lengths: `auto` gives them groups of different sizes."""
    path = tmp_path_factory.mktemp("data") / "data.h5"
    seed = str(np.random.SeedSequence().entropy)[:9]
    options = "--lengths 30:1500 --q-heads 4 --kv-heads 2 --head-dim 32 --causal --seed"
    assert main(["make-data", str(path), "--items", str(ITEMS), *options.split(), seed]) == 0
    return path


def command(data: Path, out: Path, *options: str) -> list[str]:
    return ["-m", "mdattn_mpi", "run", str(data), "-o", str(out), *RUN, *options]


def summary(out: Path) -> dict[str, object]:
    return dict(json.loads(Path(f"{out}.run/summary.json").read_text()))


@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (4, 2), (3, 1)])
def test_the_bytes_are_those_of_one_group_alone(
    ranks: int, size: int, data: Path, tmp_path: Path
) -> None:
    together, alone = tmp_path / "together.h5", tmp_path / "alone.h5"
    run = mpirun(ranks, command(data, together, "--group-size", str(size)), check=True)
    assert f"{ranks // size} groups of {size} rank" in run.stderr
    mpirun(size, command(data, alone), check=True)
    assert results(together) == results(alone)
    assert main(["verify", str(together), "--data", str(data)]) == 0
    everybody = summary(together)["ranks"]
    assert len(everybody) == ranks  # type: ignore[arg-type]


def test_auto_is_right_and_gives_the_same_bytes_again(data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.h5", tmp_path / "second.h5"
    run = mpirun(4, command(data, first, "--group-size", "auto"), check=True)
    assert run.stderr.count("mdattn: groups: ") > 1, run.stderr
    mpirun(4, command(data, second, "--group-size", "auto"), check=True)
    assert results(first) == results(second)
    assert main(["verify", str(first), "--data", str(data), "--all"]) == 0


@pytest.mark.parametrize("size", ["1", "auto"])
def test_a_rank_is_killed_and_the_job_resumed(size: str, data: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out.h5", tmp_path / "whole.h5"
    options = ("--group-size", size)
    mpirun(3, command(data, whole, *options), check=True)
    first = mpirun(3, command(data, out, *options, "--chaos", "kill@enqueue:#2:0"))
    assert first.returncode != 0
    assert "SIGKILL" in first.stderr
    left = done(out)
    assert left < ITEMS
    second = mpirun(3, command(data, out, *options), check=True)
    assert f"resuming: {left} of {ITEMS}" in second.stderr or not left
    assert results(out) == results(whole)


def test_one_group_is_told_to_stop_and_all_do(data: Path, tmp_path: Path) -> None:
    """The signal reaches one rank only, and the others hear of it at the counter."""
    out, whole = tmp_path / "out.h5", tmp_path / "whole.h5"
    mpirun(2, command(data, whole, "--group-size", "1"), check=True)
    slow = ("--group-size", "1", "--chaos", "slow@enqueue::1")
    process = start(2, command(data, out, *slow))
    try:
        for _ in range(600):
            time.sleep(0.1)
            if done(out) >= 1:
                break
        watchdogs = [
            pid
            for pid, name in processes(mark_of(process)).items()
            if name == "mdattn-watchdog" and b"OMPI_COMM_WORLD_RANK=1\0" in environ(pid)
        ]
        for pid in watchdogs:
            os.kill(pid, signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    finally:
        kill_all(mark_of(process))
    if process.returncode == 0:
        pytest.skip("the job was over before the signal")
    assert process.returncode == 75, err
    mpirun(2, command(data, out, "--group-size", "1"), check=True)
    assert results(out) == results(whole)


def environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def test_a_bad_item_fails_alone(data: Path, tmp_path: Path) -> None:
    bad, out = tmp_path / "bad.h5", tmp_path / "out.h5"
    bad.write_bytes(data.read_bytes())
    with h5py.File(bad, "r+") as file:
        query = file["items/item4/query"]
        start_of_query = query.id.get_offset()
    with bad.open("r+b") as raw:
        raw.seek(start_of_query)
        raw.write(b"\xc0\x7f")  # NaN in BF16
    run = mpirun(2, command(bad, out, "--group-size", "1"))
    assert run.returncode == 1, run.stderr
    assert "item4" in run.stderr
    assert [each["item"] for each in summary(out)["items"]["failed"]] == ["item4"]  # type: ignore[index,call-overload]
    assert done(out) == ITEMS - 1


def test_an_error_in_one_group_ends_all(data: Path, tmp_path: Path) -> None:
    fault = ("--group-size", "1", "--chaos", "raise@enqueue:#0:2")
    run = mpirun(3, command(data, tmp_path / "out.h5", *fault))
    assert run.returncode != 0
    assert "chaos" in run.stderr


def test_sizes_that_changed_are_refused_on_resume(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    mpirun(2, command(data, out, "--group-size", "1", "--items", "*"), check=True)
    other = mpirun(2, command(data, out, "--group-size", "2"))
    assert other.returncode == 2
    assert "group_size was" in other.stderr
    more = mpirun(3, command(data, out, "--group-size", "1"))
    assert more.returncode == 0, more.stderr  # another number of groups gives the same bytes


def test_ranks_that_no_group_takes_wait_for_the_others(tmp_path: Path) -> None:
    """On nodes of 2 and 1 ranks, `auto` may use groups of 2 and leave the third rank out."""
    data, out = tmp_path / "data.h5", tmp_path / "out.h5"
    assert main(["make-data", str(data), "--items", "1", "--length", "2000"]) == 0
    script = (
        "import os, sys; rank = int(os.environ.get('OMPI_COMM_WORLD_RANK', "
        "os.environ.get('PMI_RANK', '0'))); os.environ['SLURMD_NODENAME'] = f'n{rank // 2}'; "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    done = mpirun(3, ["-c", script, *command(data, out, "--group-size", "auto")], check=True)
    assert "1 of 1 item done" in done.stderr
