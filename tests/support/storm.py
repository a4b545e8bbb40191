"""Kill storms: run the real job, kill -9 something at a random moment, and resume, till it is done.

``python -m tests.support.storm --seeds 200`` prints one line a seed. Each seed draws the ranks, the
strategy, and for several attempts what dies and when. After every attempt: no process is left, the
output opens, and every item that the ledger calls done has its final bytes. At the end the output
is the same, byte for byte, as that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

import h5py

from mdattn_mpi.cli import main as mdattn
from mdattn_mpi.dataset import open_output
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.lockstep.board import BoardFile
from tests.support.mpirun import kill_all, mark_of, mpirun, orphans, processes, start

ITEMS = 10
PATIENCE = 120.0
TARGETS = ("rank", "watchdog", "mpirun", "all", "rank and mpirun", "two ranks")
JOBS = [(ranks, strategy) for ranks in (2, 3) for strategy in ("ring", "allgather", "ulysses")]


class Storm:
    """The undisturbed runs that stormy ones are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data.h5"
        options = "--lengths 900:2500 --q-heads 4 --kv-heads 2 --head-dim 64 --causal --seed 1"
        assert not mdattn(["make-data", str(self.data), "--items", str(ITEMS), *options.split()])

    def command(self, out: Path, strategy: str) -> list[str]:
        """Arguments of Python for one attempt."""
        return [
            *("-m", "mdattn_mpi", "run", str(self.data), "-o", str(out)),
            *("-s", strategy, "-b", "cpu", "--lse", "--threads", "1"),
        ]

    @functools.cache  # noqa: B019
    def undisturbed(self, ranks: int, strategy: str) -> tuple[dict[str, bytes], float]:
        """What the job gives, and how many seconds it takes."""
        out = self.folder / f"{ranks}-{strategy}.h5"
        began = time.monotonic()
        mpirun(ranks, self.command(out, strategy), check=True)
        return results(out), time.monotonic() - began

    def run(self, seed: int) -> str:
        """Raise one storm; return what happened in words, or raise AssertionError."""
        draw = random.Random(seed)
        ranks, strategy = JOBS[seed % len(JOBS)]
        expected, seconds = self.undisturbed(ranks, strategy)
        out = self.folder / f"storm-{seed}.h5"
        story = [f"seed {seed}: {ranks} ranks, {strategy}"]
        for attempt in range(draw.randint(2, 5)):
            process = start(ranks, self.command(out, strategy), stdout=subprocess.DEVNULL)
            moment = wait(process, out, draw, seconds)
            target = draw.choice(TARGETS)
            strike(process, target, draw)
            code, said = finish(process)
            done = check(out, expected, " | ".join(story) + said)
            story.append(f"{target} {moment}: exit {code}, {done} done")
            assert code or done == ITEMS, (story, attempt, said)
        last = mpirun(ranks, self.command(out, strategy), timeout=PATIENCE)
        assert last.returncode == 0, (story, last.stderr)
        assert results(out) == expected, story
        out.unlink()
        return " | ".join(story)


def wait(process: Popen[str], out: Path, draw: random.Random, seconds: float) -> str:
    """Wait for a random moment: of the clock, or a little after a random number of items."""
    moment, items = draw.uniform(0.0, 1.1 * seconds), draw.randrange(ITEMS)
    by_clock, later = draw.random() < 0.4, draw.uniform(0.0, 0.1)
    end = time.monotonic() + (moment if by_clock else PATIENCE)
    while process.poll() is None and time.monotonic() < end:
        records = [] if by_clock else BoardFile(f"{out}.run").records()
        began = records and all(record.pid in processes(mark_of(process)) for record in records)
        if began and max(record.done for record in records) >= items:
            break
        time.sleep(0.005)
    time.sleep(0.0 if by_clock else later)
    return f"at {moment:.2f} s" if by_clock else f"{later:.2f} s after {items} items"


def strike(process: Popen[str], target: str, draw: random.Random) -> None:
    """Kill -9 what `target` names, if it is there yet or still."""
    by_kind: dict[str, list[int]] = {"rank": [], "watchdog": [], "reaper": [], "mpirun": []}
    for pid, name in processes(mark_of(process)).items():
        kind = name.removeprefix("mdattn-") if name.startswith("mdattn-") else "rank"
        by_kind["mpirun" if name.startswith(("prte", "mpirun")) else kind].append(pid)
    doomed = {
        "rank": draw.sample(by_kind["rank"], min(1, len(by_kind["rank"]))),
        "two ranks": by_kind["rank"][:2],
        "watchdog": draw.sample(by_kind["watchdog"], min(1, len(by_kind["watchdog"]))),
        "mpirun": by_kind["mpirun"],
        "rank and mpirun": by_kind["rank"][-1:] + by_kind["mpirun"],
        "all": [pid for pids in by_kind.values() for pid in pids],
    }[target]
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finish(process: Popen[str]) -> tuple[int, str]:
    """Wait for the end of a run, which must come soon and leave nothing behind."""
    mark = mark_of(process)
    try:
        _, said = process.communicate(timeout=PATIENCE)
        left = orphans(mark)
        assert not left, f"{left} stayed behind: {said}"
    finally:
        kill_all(mark)
    return process.returncode, said


def check(out: Path, expected: dict[str, bytes], story: str) -> int:
    """Count the finished items; each must have its final bytes already."""
    if not out.exists():
        return 0
    try:
        output = open_output(str(out))
    except RejectedError as error:
        raise AssertionError(f"{story}: the output doesn't open: {error}") from error
    with output:
        done = [item.name for item in output.items if output.ledger.state(item) == "done"]
    found = results(out)
    for name in done:
        for kind in ("output", "lse"):
            assert found[f"{name}/{kind}"] == expected[f"{name}/{kind}"], f"{story}: {name}/{kind}"
    return len(done)


def results(path: Path) -> dict[str, bytes]:
    """Return the raw bytes of every output dataset."""
    found: dict[str, bytes] = {}
    with h5py.File(path) as file, path.open("rb") as raw:
        for name, item in file["items"].items():
            for kind, dataset in item.items():
                raw.seek(dataset.id.get_offset())
                found[f"{name}/{kind}"] = raw.read(dataset.id.get_storage_size())
    return found


def done(path: Path) -> int:
    """Count the items that are finished, of an output that may be written just now."""
    try:
        with h5py.File(path, locking=False) as file:
            return int((file["ledger/state"][...] == 1).sum())
    except OSError:  # it isn't there yet
        return 0


def main() -> int:
    """Raise the storms; print one line a seed and the sum."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    calm = 0
    with tempfile.TemporaryDirectory(prefix="mdattn-storm-") as folder:
        storm = Storm(Path(folder))
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            try:
                print(storm.run(seed), flush=True)
                calm += 1
            except AssertionError as error:
                print(f"seed {seed} FAILED: {error}", flush=True)
    print(f"{calm} of {arguments.seeds} storms ended well")
    return 0 if calm == arguments.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
