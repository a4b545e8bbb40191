"""Compute exact attention over every item of a dataset, by all ranks together.

  mpirun -n 4 mdattn run data.h5 -o out.h5
  mpirun -n 4 mdattn run tokens.h5 --model DIR -o out.h5

Each rank reads its shard of an item, all ranks attend in lockstep, each writes its shard of the
output. With --model it is a whole transformer that they run over token ids (or an ONNX model: on
CPUs, by -b cuda or -b tensorrt); with --engine and --bind, a model's TensorRT engine. The same
command again does only what isn't done. Beside the output, OUT.h5.run/ gets summary.json, what
`mdattn report` makes a page of, the log of the first rank and of any other that has something to
say, and a death note if a rank is lost.
"""

from __future__ import annotations

import argparse
from typing import Any

from mdattn_mpi.cli.options import add_opening_options

EPILOG = """\
Signals: SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 let the job finish and commit the item in hand, then
end with 75; a second one ends at once. Finished items are safe in every case.

Exit codes: 0 all done; 1 some items failed, or the output can't be written; 2 rejected before any
work; 3 ranks disagreed; 4 device or engine error, or a bug; 75 interrupted, run the
same command again.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; those left out come from the job file, then from `JobSpec`."""
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA.h5", help="the dataset")
    add("-o", "--output", metavar="OUT.h5", help="the output; resumed when it is there")
    add("--job", metavar="JOB.toml", help="options from a file, under these same names")
    add("--dry-run", action="store_true", help="check everything, print the plan, do nothing")
    add("--json", action="store_true", help="print the summary as JSON on standard output")

    add("-q", "--quiet", action="store_true", help="say nothing but what goes wrong")
    add("-v", "--verbose", action="store_true", help="say all that rank 0 logs")

    how = parser.add_argument_group("how")
    add = how.add_argument
    add("-b", "--backend", metavar="NAME", help="auto (default), cpu, cuda, tensorrt")
    strategies = "auto (default), ring, allgather, ulysses, hierarchical (over several nodes)"
    add("-s", "--strategy", metavar="NAME", help=strategies)
    add("--group-size", metavar="P", help="ranks that share an item: all (default), auto, a number")
    add("--threads", type=int, metavar="N", help="CPU threads a rank (default: its share of cores)")
    add("--transfer", metavar="HOW", help="between GPUs: auto (default), copy, nccl")
    add("--kernel", metavar="NAME", help="attention on GPUs: auto (default), cudnn, flash")
    add("--engine", metavar="FILE", help="a serialized TensorRT engine to run")
    bind = "bind a model's input or output to a dataset: hidden=items/*/hidden:0"
    add("--bind", action="append", metavar="TENSOR=PATH", help=bind)

    model = parser.add_argument_group("a transformer over token ids")
    add = model.add_argument
    folder = "a folder with config.json and safetensors; or an .onnx file"
    add("--model", metavar="DIR", help=folder)
    give = "last_hidden_state (default), embedding, logprobs; several with commas"
    add("--give", metavar="NAMES", help=give)
    add("--pool", metavar="HOW", help="of an embedding: mean (default), last, first")
    dtype = "of weights and hidden states (ONNX on GPUs: of products): bf16 (default), fp16"
    add("--dtype", metavar="T", help=dtype)
    beyond = "take sequences longer than the model's positions, if it computes these"
    add("--beyond-positions", action="store_true", help=beyond)

    what = parser.add_argument_group("what")
    add = what.add_argument
    add("--items", metavar="PATTERN", help="only these: names or globs, separated by commas")
    add("--lse", action="store_true", help="write the log-sum-exp of every row and head too")
    add("--layout", metavar="L", help="of the dataset: auto (default), token_major, head_major")
    add("--nonfinite", metavar="P", help="NaN or infinity in an item: refuse (default) it, or pass")
    add_opening_options(what)

    again = parser.add_argument_group("again, and how long")
    add = again.add_argument
    add("--overwrite", action="store_true", help="start over, whatever the output holds")
    add("--redo", action="store_true", help="compute the items that --items names again")
    add(
        "--allow-change",
        action="store_true",
        help="resume with other ranks, -b, -s, --kernel, --transfer or --engine",
    )
    add("--deadline", type=duration, metavar="T", help="longest wait (default: scaled to the work)")
    add("--max-time", type=duration, metavar="T", help="stop after the item in hand when T is over")
    together = "sync short items together, every T, 1s at most (default: none waits for the next)"
    add("--commit-every", type=duration, metavar="T", help=together)
    add("--chaos", help=argparse.SUPPRESS)


def duration(text: str) -> float:
    """Seconds from ``90``, ``15m``, ``2h`` or Slurm's ``[D-]HH:MM:SS``."""
    days, dash, clock = text.rpartition("-")
    try:
        if ":" in clock:
            parts = [float(part) for part in clock.split(":")]
            seconds = sum(part * 60.0**place for place, part in enumerate(reversed(parts)))
        else:
            unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(clock[-1:], 0)
            seconds = float(clock[:-1]) * unit if unit else float(clock)
        seconds += 86400 * int(days) if dash else 0
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} isn't a duration; write 90, 15m, 2h or HH:MM:SS"
        )
    return seconds


def main(arguments: argparse.Namespace) -> int:
    """Run the job under the watchdog; return its exit code."""
    from mdattn_mpi.lockstep import watch

    return watch(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> int:
    from mdattn_mpi.lockstep import board, start

    if "deadline" in arguments and arguments.deadline:
        board().patience = arguments.deadline
    if "chaos" in arguments:
        from mdattn_mpi.lockstep.chaos import arm

        arm(arguments.chaos, board())
    world = start()
    from mdattn_mpi.runner.main import run_job

    return run_job(lambda: spec_of(arguments), world)


def spec_of(arguments: argparse.Namespace) -> Any:
    """Put command line, job file and defaults together, in this order of precedence.

    Raises
    ------
    RejectedError
        A bad job file, a bad value, or no dataset or output named.

    """
    from mdattn_mpi.errors import RejectedError
    from mdattn_mpi.runner.jobspec import JobSpec, load_job_file

    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name not in ("main", "job")
    }
    if given.pop("redo", False):
        if "items" not in given:
            raise RejectedError(
                "--redo without --items", fix="say what to compute again: --items NAME --redo"
            )
        given["redo"] = given.pop("items")
    fields = {**(load_job_file(arguments.job) if "job" in arguments else {}), **given}
    for name, shown in (("data", "DATA.h5"), ("output", "-o OUT.h5")):
        if name not in fields:
            raise RejectedError(f"no {name} was named", fix=f"add {shown}, or name it in --job")
    return JobSpec(**fields)
