"""What a rank opens before its first item: at 1,000 ranks it is asked of one file system."""

from __future__ import annotations

from pathlib import Path

from mdattn_mpi.cli import main
from tests.support.mpirun import mpirun

COUNTED = ("-m", "tests.support.opened")

# Files that Python opens for a rank and its watchdog, more than for a bare MPI program, in a short
# job on the CPU: 89 and, where the output is made, 118; at d201c53 182. A new module counts one.
MOST = 92
MOST_WHERE_THE_OUTPUT_IS_MADE = 121


def opened(folder: Path, *program: str) -> list[int]:
    """Files that each of two ranks opened, the fewest first."""
    counts = folder / "counts"
    counts.unlink(missing_ok=True)
    mpirun(2, [*COUNTED, str(counts), *program], check=True)
    return sorted(int(line.split()[1]) for line in counts.read_text().splitlines())


def test_a_rank_opens_little_more_than_a_bare_program(tmp_path: Path) -> None:
    data, out = tmp_path / "data.h5", tmp_path / "out.h5"
    main(["make-data", str(data), "--items", "3", "--length", "33", "--head-dim", "16", "--quiet"])
    bare = opened(tmp_path, "bare")
    ours = opened(tmp_path, "mdattn", "run", str(data), "-o", str(out), "-b", "cpu", "-q")
    assert len(bare) == len(ours) == 2
    assert bare[0] > 100  # it counts: NumPy alone is that many
    assert ours[0] > bare[0] + 50  # ours too
    assert ours[0] - bare[0] <= MOST
    assert ours[1] - bare[1] <= MOST_WHERE_THE_OUTPUT_IS_MADE

    again = mpirun(2, ["-m", "mdattn_mpi", "run", str(data), "-o", str(out), "-b", "cpu"])
    assert again.returncode == 0
    assert "3 of 3 items done, none of them now" in again.stderr
    assert "backend" not in again.stderr  # nothing was opened or planned
