"""What Slurm knows of a job that `mdattn submit` has handed to it.

The script lies beside the output. Slurm makes a copy when it is submitted; after that its last line
says as which job. See squeue(1).
"""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PATIENCE = 10.0  # seconds for squeue to answer
_SUBMITTED = re.compile(r"^# Submitted as job (\d+)$", re.MULTILINE)
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
_HERE = {*_WAITING, "RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "COMPLETING"}


class SlurmJob(NamedTuple):
    """A job that hasn't ended."""

    number: str
    state: str  # in Slurm's words, such as PENDING or RUNNING
    reason: str  # why it waits, such as Priority

    @property
    def waits(self) -> bool:
        """Whether it isn't running yet, or not again."""
        return self.state in _WAITING

    def __str__(self) -> str:
        """For example ``job 4711: PENDING (Priority)``."""
        return f"job {self.number}: {self.state}" + (f" ({self.reason})" if self.reason else "")


def script_path(output: str) -> Path:
    """Where the script of the job that writes `output`, a file or a folder, lies."""
    path = Path(output)
    return path.with_name(f"{path.name or 'mdattn'}.sbatch")


def note_job(script: Path, number: str) -> None:
    """Write into a script as which job it was submitted."""
    with suppress(OSError), script.open("a") as file:
        file.write(f"\n# Submitted as job {number}\n")


def job_of_script(script: Path) -> SlurmJob | None:
    """Find the job that a script was last submitted as; None if it has ended, or nobody knows."""
    with suppress(OSError):
        numbers = _SUBMITTED.findall(script.read_text(errors="replace"))
        return _ask(numbers[-1]) if numbers else None
    return None


def job_of_output(output: str) -> SlurmJob | None:
    """Find the job that writes `output`, by itself or as one of an array into its folder."""
    folder = str(Path(output).absolute().parent)
    return job_of_script(script_path(output)) or job_of_script(script_path(folder))


def _ask(number: str) -> SlurmJob | None:
    command = ["squeue", "--noheader", "--jobs", number, "--format=%T %r"]
    try:
        answer = subprocess.run(
            command, text=True, capture_output=True, timeout=PATIENCE, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):  # also where Slurm has forgotten the job
        return None
    state, _, reason = answer.partition("\n")[0].strip().partition(" ")
    return SlurmJob(number, state, reason.replace("None", "")) if state in _HERE else None
