"""Run the real job with a disk that fails on purpose at one rank's Nth write or sync.

``python -m tests.support.failing_disk`` tries every N, until one run is clean, for a disk that gets
full and stays so and for one that fails once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

from mdattn_mpi.cli import main as mdattn
from tests.support.mpirun import mpirun
from tests.support.storm import check, results

SOURCE = Path(__file__).with_suffix(".c")
RANKS = 2
MODES = (("ENOSPC", "from"), ("EIO", "once"))


def build(folder: Path) -> Path | None:
    """Compile the shim; None where there is no compiler or no preloading."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "failing_disk.so"
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"],
        check=True,
        timeout=120,
    )
    return library


class FailingDisk:
    """A small job, what it gives on a good disk, and the shim."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder = folder
        self.library = library
        self.data = folder / "data.h5"
        self.out = folder / "out.h5"
        options = "--items 2 --lengths 100:200 --q-heads 2 --kv-heads 1 --head-dim 16 --seed 3"
        assert not mdattn(["make-data", str(self.data), *options.split()])
        self.counts = [self._count(rank) for rank in range(RANKS)]
        self.expected = results(self.out)

    def run(
        self, rank: int = -1, at: int = 0, mode: tuple[str, str] = MODES[0]
    ) -> CompletedProcess[str]:
        """Run the job; the call `at` (from 1) of `rank` fails."""
        shim = {
            "LD_PRELOAD": str(self.library),
            "MDATTN_FAIL_PATH": self.out.name,
            "MDATTN_FAIL_RANK": str(rank),
            "MDATTN_FAIL_AT": str(at),
            "MDATTN_FAIL_WITH": mode[0],
            "MDATTN_FAIL_ON": mode[1],
            "MDATTN_FAIL_COUNT": str(self.folder / f"count-{rank}"),
        }
        command = ["-m", "mdattn_mpi", "run", str(self.data), "-o", str(self.out)]
        return mpirun(
            RANKS, [*command, "-s", "ring", "-b", "cpu", "--lse", "--threads", "1"],
            env=shim if rank >= 0 else None,
        )  # fmt: skip

    def _count(self, rank: int) -> int:
        """Count the writes and syncs of one rank in a run that nothing disturbs."""
        self.clean()
        done = self.run(rank)
        assert done.returncode == 0, done.stderr
        return int((self.folder / f"count-{rank}").read_text())

    def clean(self) -> None:
        """Forget the output."""
        self.out.unlink(missing_ok=True)
        shutil.rmtree(f"{self.out}.run", ignore_errors=True)

    def strike(self, rank: int, at: int, mode: tuple[str, str]) -> str:
        """Let one call fail, then resume on a good disk; return what happened in words."""
        self.clean()
        done = self.run(rank, at, mode)
        story = f"{mode[0]} {mode[1]} call {at} of {self.counts[rank]} on rank {rank}"
        assert done.returncode in (0, 1, 2), (story, done.returncode, done.stderr)
        if done.returncode:
            assert done.stderr.count("mdattn: error:") == 1, (story, done.stderr)
            assert "Fix:" in done.stderr, (story, done.stderr)
        assert "mdattn: rank" not in done.stderr, (story, done.stderr)
        assert done.returncode != 2 or not self.out.exists(), (story, done.stderr)
        assert not list(self.folder.glob(".*")), story
        finished = check(self.out, self.expected, story)
        assert done.returncode or finished == len(self.expected) // 2, story
        again = self.run()
        assert again.returncode == 0, (story, again.stderr)
        assert results(self.out) == self.expected, story
        return f"{story}: exit {done.returncode}, {finished} items finished"


def main() -> int:
    """Try every call of every rank; return 0 if all ended well."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mdattn-disk-") as name:
        folder = Path(name)
        library = build(folder)
        if library is None:
            print("no C compiler here")
            return 0
        (folder / "job").mkdir()
        disk = FailingDisk(folder / "job", library)
        tries = [
            (r, at, m) for m in MODES for r, n in enumerate(disk.counts) for at in range(1, n + 2)
        ]
        for rank, at, mode in tries:
            try:
                print(disk.strike(rank, at, mode), flush=True)
            except AssertionError as error:
                failed += 1
                print(f"FAILED: {error}", flush=True)
    print(f"{len(tries) - failed} of {len(tries)} ended well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
