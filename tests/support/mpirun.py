"""Run the package under a real mpirun, and leave nothing behind.

`mpirun` runs Python on N ranks and returns what they printed. `start` does the same without
waiting, for tests that kill things.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import pytest

from mdattn_mpi.doctor.facts import stale_sessions
from mdattn_mpi.lockstep.process import Process

ROOT = Path(__file__).resolve().parents[2]
MARK = "MDATTN_TEST_RUN"  # every process of one run carries the same value in its environment
PATIENCE = 90.0  # seconds before a run counts as hung; a busy machine is slow, not wrong


# Open MPI 5's mpirun may crash by itself in its PMIx server after ranks were killed, once in some
# hundred runs, or hang till our reaper kills it: the exit code that it was about to pass on is what
# it had printed then.
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGKILL)


@functools.cache
def launcher() -> tuple[str, ...]:
    """The mpirun of the MPI that mpi4py uses, with what a test machine needs."""
    beside = Path(sys.executable).parent / "mpirun"
    command = str(beside) if beside.exists() else "mpirun"
    version = subprocess.check_output([command, "--version"], text=True, timeout=60)
    if "Open MPI" in version:
        return (command, "--oversubscribe", "--bind-to", "none")
    return (command,)


def is_open_mpi() -> bool:
    """Whether that mpirun is Open MPI's."""
    return len(launcher()) > 1


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a run: one BLAS thread a rank, mpirun allowed as root, one mark."""
    return {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_btl": "^ofi",  # where it finds no fabric it sleeps for a second at every start
        "OMPI_MCA_mpi_yield_when_idle": "1",  # other tests run meanwhile
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        MARK: uuid.uuid4().hex,
        **(changes or {}),
    }


def processes(mark: str) -> dict[int, str]:
    """Living processes that carry `mark`, with their command names."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes():
                continue
        except OSError:
            continue  # it ended while we looked, or it is not ours
        process = Process.look(int(folder.name))
        if process and process.is_alive:
            found[process.pid] = process.name
    return found


def kill_all(mark: str) -> None:
    """Kill -9 everything that carries `mark`, stopped or not, until nothing is left."""
    for _ in range(100):
        for pid in (left := processes(mark)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(0.05)


def clear_session_folders() -> None:
    """Remove what killed mpiruns of Open MPI left: one that gets such a pid again won't start.

    It says "The PMIx server's listener thread failed to start".
    """
    for folder in stale_sessions(tempfile.gettempdir()):
        shutil.rmtree(folder, ignore_errors=True)


def orphans(mark: str, patience: float = 10.0) -> dict[int, str]:
    """Processes of a run that are still there some time after its end."""
    end = time.monotonic() + patience
    while (left := processes(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def mark_of(process: Popen[str]) -> str:
    """Return what all processes of a run that `start` began carry."""
    mark: str = process.mark  # type: ignore[attr-defined]
    return mark


def start(
    ranks: int,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = (),
    options: Sequence[str] = (),
    **popen: Any,
) -> Popen[str]:
    """Start `python *argv` on `ranks` ranks by `program` (or `launcher`); see `mark_of`."""
    clear_session_folders()
    variables = environment(env)
    process = Popen(
        [*(program or launcher()), *options, "-n", str(ranks), sys.executable, *argv],
        env=variables,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen},
    )
    process.mark = variables[MARK]  # type: ignore[attr-defined]
    return process


def mpirun(
    ranks: int,
    argv: Sequence[str],
    *,
    timeout: float = PATIENCE,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = (),
    options: Sequence[str] = (),
    check: bool = False,
    cwd: str | Path | None = None,
) -> CompletedProcess[str]:
    """Run ``python *argv`` on `ranks` ranks to its end.

    Parameters
    ----------
    ranks
        How many.
    argv
        What follows ``python``: a script, ``-c CODE`` or ``-m MODULE …``.
    timeout
        Seconds after which the run is killed and the test fails with what was printed.
    env, program, options
        Changes to the environment; what starts ranks, if not `launcher`; more options for it.
    check
        Fail the test unless the exit code is 0.

    Fails the test when a process of the run outlives it.

    """
    process = start(ranks, argv, env=env, program=program, options=options, cwd=cwd)
    mark = mark_of(process)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(mark)
        out, err = process.communicate()
        pytest.fail(f"mpirun -n {ranks} {list(argv)} hung for {timeout} s\n{out}\n{err}")
    finally:
        left = orphans(mark)
        kill_all(mark)
    assert not left, f"mpirun -n {ranks} {list(argv)} left {left} behind\n{out}\n{err}"
    if process.returncode in CRASHES and (said := re.search(r"Exit code: +(\d+)", err)):
        process.returncode = int(said[1])
    if check and process.returncode:
        pytest.fail(f"mpirun -n {ranks} {list(argv)}: exit {process.returncode}\n{out}\n{err}")
    return CompletedProcess(process.args, process.returncode, out, err)
