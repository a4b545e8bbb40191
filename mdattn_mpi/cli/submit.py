"""Write the Slurm script of a job beside its output, submit it, and say how to watch it.

  mdattn submit data.h5 -o out.h5 --nodes 2 --gpus-per-node 8 --time 04:00:00
  mdattn submit *.h5 -o results/ --array 4 --nodes 1 --gpus-per-node 8
  mdattn submit data.h5 -o out.h5 --nodes 1 --gpus-per-node 8 --requeue \\
      --run -s ring --lse

The second runs 4 files at a time. What follows --run goes to mdattn run. The same command again
resumes.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdattn_mpi.cli.options import whole_number
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.files import write_whole
from mdattn_mpi.slurm import job_of_script, note_job, script_path
from mdattn_mpi.text import duration

EPILOG = """\
Exit codes: 0 submitted (or shown); 2 refused, by mdattn or by Slurm.
"""

SIGNATURE = "# Written by mdattn submit; the same command replaces it."

# What may stand in an #SBATCH line. Slurm checks the meaning.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+@-]{0,199}")
_TIME = re.compile(r"(?:\d{1,4}-)?\d{1,6}(?::\d{1,2}){0,2}")
WARNING = 180  # seconds before the limit, or a tenth of a short one
_NAMES = ("account", "partition", "qos", "constraint", "reservation", "mpi")

Lines = list[str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("data", nargs="+", metavar="DATA.h5", help="the dataset; several with --array")
    add("-o", "--output", required=True, metavar="OUT", help="the output; a folder with --array")
    add("--dry-run", action="store_true", help="print the script; write and submit nothing")

    size = parser.add_argument_group("how large")
    add = size.add_argument
    add("--nodes", type=whole_number, required=True, metavar="N")
    add(
        "--gpus-per-node",
        type=whole_number,
        default=0,
        metavar="G",
        help="one rank each (default: none)",
    )
    add("--ranks-per-node", type=whole_number, metavar="R", help="without GPUs (default: 1)")
    add(
        "--cpus-per-rank",
        type=whole_number,
        metavar="C",
        help="cores a rank (default: 8 with GPUs, else 1)",
    )
    add("--time", default="", metavar="T", help="the limit: MM, HH:MM:SS or D-HH:MM:SS")
    add(
        "--array",
        type=whole_number,
        metavar="K",
        help="a job for every dataset, K of them at a time",
    )

    where = parser.add_argument_group("where and how")
    add = where.add_argument
    for name in ("account", "partition", "qos", "constraint", "reservation"):
        add(f"--{name}", default="", metavar="NAME", help="as for sbatch")
    add("--setup", metavar="FILE", help="a shell file to source first: modules, environment")
    add("--requeue", action="store_true", help="go back to the queue when preempted or out of time")
    add(
        "--warning",
        type=whole_number,
        metavar="S",
        help="seconds before the limit at which the job is told to stop (default: a tenth of it, "
        f"at most {WARNING})",
    )
    add("--launcher", choices=("srun", "mpirun"), default="srun", help="default: srun")
    add("--mpi", default="pmix", metavar="TYPE", help="of `srun --mpi=list` (default: pmix)")
    add("--doctor", action="store_true", help="check all nodes first; stop when one is unfit")
    add("--run", nargs=argparse.REMAINDER, default=[], help="all that follows goes to mdattn run")


def main(arguments: argparse.Namespace) -> int:
    """Write, submit, and say how to watch."""
    check(arguments)
    text = script(arguments)
    if arguments.dry_run:
        print(text, end="")
        return 0
    job, path = submit(arguments, text)
    print(f"submitted job {job} with {path}")
    print(f"log:    {job_name(arguments)}-{_log_number(arguments, job)}.log")
    print(f"watch:  squeue --jobs {job}")
    print(f"        mdattn status {shlex.quote(arguments.output)} --watch")
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse what can't be, and whatever could mean more to a shell or to Slurm than it says.

    Raises
    ------
    RejectedError
        Names the option, the value and what would do.

    """
    for path in (*arguments.data, arguments.output, arguments.setup or ""):
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
            raise RejectedError(f"control characters in the name {path!r}", fix="rename the file")
    for name in _NAMES:
        value = getattr(arguments, name)
        if value and not _NAME.fullmatch(value):
            raise RejectedError(
                f"--{name} is {value!r}", fix="use letters, digits and any of _.,+@- only"
            )
    if arguments.time and not _TIME.fullmatch(arguments.time):
        raise RejectedError(
            f"--time is {arguments.time!r}", fix="write minutes, HH:MM:SS or D-HH:MM:SS"
        )
    limit = seconds_of(arguments.time)
    if limit and limit <= (arguments.warning or 0):
        raise RejectedError(
            f"--warning {arguments.warning} is no less than the limit of {duration(limit)}",
            fix="leave --warning out, or give fewer seconds",
        )
    if arguments.gpus_per_node and arguments.ranks_per_node not in (None, arguments.gpus_per_node):
        raise RejectedError(
            f"{arguments.ranks_per_node} ranks for {arguments.gpus_per_node} GPUs a node",
            fix="leave --ranks-per-node out: every GPU gets one rank",
        )
    if arguments.requeue and arguments.launcher == "mpirun":
        raise RejectedError(
            "--requeue doesn't go with mpirun, whose daemons die of Slurm's signals",
            fix="use --launcher srun",
        )
    given = _check_run_options(arguments.run)
    _check_files(arguments)
    _check_inputs(arguments.data, model="bind" in given)
    size, ranks = getattr(given, "group_size", "all"), arguments.nodes * _ranks_per_node(arguments)
    if size.isdecimal() and (int(size) < 1 or ranks % int(size)):
        raise RejectedError(
            f"{ranks} ranks can't be cut into groups of {size}",
            fix="give a --group-size that divides the number of ranks, or auto",
        )


def seconds_of(limit: str) -> int:
    """The seconds of sbatch's time limit: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, clock = limit.rpartition("-")
    numbers = [int(part) for part in clock.split(":") if part]
    if not dash and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, minutes, seconds = (*numbers, 0, 0, 0)[:3]
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


def _check_files(arguments: argparse.Namespace) -> None:
    for path in (*arguments.data, *([arguments.setup] if arguments.setup else [])):
        if not Path(path).is_file():
            raise RejectedError("no such file", file=path, fix="check the path")
    if arguments.array:
        names = [Path(path).name for path in arguments.data]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RejectedError(
                f"two datasets would write {twice[0]!r} into one folder",
                fix="submit them with different -o",
            )
    elif len(arguments.data) > 1:
        raise RejectedError(
            f"{len(arguments.data)} datasets for one job",
            fix="add --array K to run a job for each, K at a time, with -o naming a folder",
        )
    if not Path(arguments.output).resolve().parent.is_dir():
        raise RejectedError("the folder isn't there", file=arguments.output, fix="create it")
    output = Path(arguments.output)
    for path in map(Path, arguments.data):
        if (output / path.name if arguments.array else output).resolve() == path.resolve():
            raise RejectedError(
                "the output would be the dataset itself",
                file=str(path),
                fix="name another folder" if arguments.array else "name another output",
            )


def _check_inputs(paths: Sequence[str], *, model: bool) -> None:
    """Refuse files that a job would refuse after its wait in the queue."""
    from mdattn_mpi.dataset.hdf5 import File
    from mdattn_mpi.dataset.index import check_format
    from mdattn_mpi.dataset.layout import DATASET_FORMAT

    for path in paths:
        with File(path, depth=0) as file:
            if not model:
                check_format(file.root, DATASET_FORMAT)


def _check_run_options(options: list[str]) -> argparse.Namespace:
    """Let ``mdattn run`` look at its options now rather than in the queue; return them."""
    from mdattn_mpi.cli import run

    class Refusing(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise RejectedError(
                f"mdattn run would refuse what follows --run: {message}",
                fix="see mdattn run --help",
            )

    for word in options:
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in word):
            raise RejectedError(f"control characters in {word!r}", fix="leave them out")
    parser = Refusing(prog="mdattn run", add_help=False)
    run.add_options(parser)
    given = parser.parse_args(options)
    for name in ("data", "output"):
        if name in given:
            raise RejectedError(
                f"the {name} is named twice, before and after --run",
                fix="give only options of mdattn run after --run",
            )
    return given


def script(arguments: argparse.Namespace) -> str:
    """Write the batch script: the one template."""
    parts: list[Lines] = [
        ["#!/bin/bash", SIGNATURE, *_resources(arguments)],
        _environment(arguments),
        _names(arguments),
        _doctor(arguments),
        _job(arguments),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def job_name(arguments: argparse.Namespace) -> str:
    """``mdattn-OUT`` with nothing in it that Slurm or a file system could take amiss."""
    stem = Path(arguments.output).resolve().stem
    return f"mdattn-{re.sub(r'[^A-Za-z0-9_.-]', '_', stem)[:60]}"


def _log_number(arguments: argparse.Namespace, job: str) -> str:
    return f"{job}_*" if arguments.array else job


def _resources(arguments: argparse.Namespace) -> Lines:
    gpus, limit = arguments.gpus_per_node, seconds_of(arguments.time)
    warning = arguments.warning or min(WARNING, max(1, limit // 10) if limit else WARNING)
    options = {
        "job-name": job_name(arguments),
        "output": "%x-%A_%a.log" if arguments.array else "%x-%j.log",
        "open-mode": "append",
        "nodes": arguments.nodes,
        "ntasks-per-node": gpus or arguments.ranks_per_node or 1,
        "cpus-per-task": arguments.cpus_per_rank or (8 if gpus else 1),
        "gpus-per-node": gpus,
        "time": arguments.time,
        "array": f"1-{len(arguments.data)}%{arguments.array}" if arguments.array else "",
        "signal": f"{'B:' if arguments.launcher == 'mpirun' else ''}USR1@{warning}",
        **{name: getattr(arguments, name) for name in _NAMES if name != "mpi"},
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
    return [*lines, "#SBATCH --requeue" if arguments.requeue else "#SBATCH --no-requeue"]


def _environment(arguments: argparse.Namespace) -> Lines:
    lines = [f"source {_path(arguments.setup)} || exit 2"] if arguments.setup else []
    if arguments.launcher == "srun":
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    return lines


def _names(arguments: argparse.Namespace) -> Lines:
    if not arguments.array:
        return [f"data={_path(arguments.data[0])}", f"out={_path(arguments.output)}"]
    return [
        "files=(",
        *(f"    {_path(path)}" for path in arguments.data),
        ")",
        "data=${files[SLURM_ARRAY_TASK_ID - 1]}",
        f"mkdir -p {_path(arguments.output)}",
        f'out={_path(arguments.output)}/"$(basename "$data")"',
    ]


def _launch(arguments: argparse.Namespace, *options: str) -> str:
    if arguments.launcher == "srun":
        return " ".join(["srun", f"--mpi={arguments.mpi}", *options])
    return f"mpirun -n {arguments.nodes * _ranks_per_node(arguments)}"


def _ranks_per_node(arguments: argparse.Namespace) -> int:
    return int(arguments.gpus_per_node or arguments.ranks_per_node or 1)


def _doctor(arguments: argparse.Namespace) -> Lines:
    if not arguments.doctor:
        return []
    return [
        f'{_launch(arguments)} mdattn doctor --folder "$(dirname "$out")"',
        "[ $? -le 1 ] || exit 2",
    ]


def _job(arguments: argparse.Namespace) -> Lines:
    launch = _launch(arguments, "--kill-on-bad-exit=1")
    command = " ".join([f'{launch} mdattn run "$data" -o "$out"', *map(shlex.quote, arguments.run)])
    if not arguments.requeue:
        return [f"exec {command}"]
    return [
        command,
        "status=$?",
        '[ "$status" -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID"',
        'exit "$status"',
    ]


def _path(path: str) -> str:
    """Quote for the shell; from the root, so that the script works wherever it is submitted."""
    return shlex.quote(str(Path(path).absolute()))


def submit(arguments: argparse.Namespace, text: str) -> tuple[str, Path]:
    """Put the script beside the output and hand it to Slurm; the job's number, and the script.

    Only a script that this command has written before is replaced. Where Slurm refuses the job,
    nothing has changed.

    Raises
    ------
    RejectedError
        There is no Slurm here, a script of somebody else's, or a job that will write this output;
        the script can't be written; or Slurm refuses it.

    """
    if not shutil.which("sbatch"):
        raise RejectedError(
            "there is no sbatch here", fix="run this on a login node, or see --dry-run"
        )
    path = script_path(arguments.output)
    before = path.read_bytes() if path.exists() else None
    if before is not None and SIGNATURE.encode() not in before.splitlines()[:2]:
        raise RejectedError(
            "there is a script of somebody else's here", file=str(path), fix="move it away"
        )
    if job := job_of_script(path):
        raise RejectedError(
            f"a job writes this output already: {job}",
            file=arguments.output,
            fix=f"wait for it, or end it first: scancel {job.number}",
        )
    try:
        write_whole(path, text.encode("utf-8", "surrogateescape"))  # paths as they are
    except OSError as error:
        raise RejectedError(
            f"can't be written: {error.strerror}",
            file=str(path),
            fix="name an output in a folder that can be written",
        ) from None
    done = subprocess.run(
        ["sbatch", "--parsable", "--", str(path)], text=True, capture_output=True, check=False
    )
    if done.returncode:
        path.unlink()
        if before is not None:
            write_whole(path, before)
        raise RejectedError(
            f"Slurm refused the job: {done.stderr.strip() or done.returncode}",
            fix="change the options that it names",
        )
    job_number = done.stdout.strip().partition(";")[0]
    note_job(path, job_number)
    return job_number, path
