"""Say what a job will take before it is submitted: time, memory, and what it will wait for.

  mdattn plan data.h5 --nodes 2 --gpus-per-node 8
  mdattn plan tokens.h5 --model DIR --nodes 1 --gpus-per-node 4 --gpu h200
  mdattn plan data.h5 -o /scratch/out.h5 --nodes 1 --ranks-per-node 16

For this many GPUs, half and twice as many; where the output that -o names is there already, what is
left to do. Nothing is computed or submitted. The output's folder is tried for a second, and so are
this machine's cores, where there are no GPUs. What is known of a GPU is the cost model's; a file
that `mdattn bench kernels --json` or `mdattn bench predict` has made on one makes it more exact.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import ceil
from typing import TYPE_CHECKING, Any

from mdattn_mpi.cli.options import add_opening_options, whole_number
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.planning.gpus import GPUS
from mdattn_mpi.text import COLUMNS, counted, duration, memory_size, quantity, show, wrapped

if TYPE_CHECKING:
    from mdattn_mpi.planning.forecast import Forecast, Hardware
    from mdattn_mpi.runner.jobspec import JobSpec
    from mdattn_mpi.runner.prospect import Prospect

EPILOG = "Exit codes: 0 it can be done; 2 it can't, or not so: says why."

LARGEST_NODE = 8  # GPUs: more than these are more nodes
SAME = ("data", "output", "backend", "json")  # options of a job that aren't put after --run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, under the names that `submit` and `run` have for them."""
    add = parser.add_argument
    add("data", metavar="DATA.h5", help="the dataset")
    add("-o", "--output", default="", metavar="OUT.h5", help="the output; its folder is tried")
    add("--json", action="store_true", help="print JSON")

    where = parser.add_argument_group("on what")
    add = where.add_argument
    add("--nodes", type=whole_number, required=True, metavar="N")
    add("--gpus-per-node", type=whole_number, default=0, metavar="G", help="one rank each")
    add("--ranks-per-node", type=whole_number, metavar="R", help="without GPUs (default: 1)")
    add("--cpus-per-rank", type=whole_number, metavar="C", help="without GPUs (default: 1)")
    add("--gpu", choices=sorted(GPUS), help="default: the one that is here, else an h100")
    add("--kernel-times", metavar="FILE", help="measured on such a GPU")

    how = parser.add_argument_group("what, and how: options of mdattn run")
    add = how.add_argument
    add("--group-size", default="auto", metavar="P", help="auto (default), all, or a number")
    add("--kernel", default="auto", metavar="NAME", help="auto (default), cudnn, flash")
    add("--lse", action="store_true")
    add("--model", default="", metavar="DIR", help="run this transformer over token ids")
    add("--give", default="last_hidden_state", metavar="NAMES")
    add("--dtype", default="bf16", metavar="T")
    add("--beyond-positions", action="store_true")
    add("--items", default="*", metavar="PATTERN")
    add("--layout", default="auto", metavar="L")
    add_opening_options(how)


def main(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from mdattn_mpi.planning.forecast import forecast
    from mdattn_mpi.runner.prospect import cores, gpus, look_at

    check(arguments)
    spec = spec_of(arguments)
    prospect = look_at(spec)
    per_node = arguments.gpus_per_node or arguments.ranks_per_node or 1
    if arguments.gpus_per_node:
        hardware = gpus(spec, prospect, per_node, arguments.gpu, arguments.kernel_times)
    else:
        hardware = cores(spec, prospect, per_node, arguments.cpus_per_rank or 1)
    asked = forecast(prospect.work, arguments.nodes, per_node, spec.group_size, hardware)
    half, double = (
        _possible(prospect, size, spec.group_size, hardware)
        for size in neighbours(arguments.nodes, per_node)
    )
    plans = [plan for plan in (half, asked, double) if plan]
    submit = submit_words(arguments, spec, asked)
    if arguments.json:
        show(json.dumps(_facts(spec, prospect, plans, plans.index(asked), submit), indent=1))
    else:
        show("\n".join(_lines(arguments, prospect, asked, plans, submit)))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that don't go together.

    Raises
    ------
    RejectedError
        Says which to leave out, or what to add.

    """
    gpus = bool(arguments.gpus_per_node)
    for name in ("gpu", "kernel_times"):
        if getattr(arguments, name) and not gpus:
            raise RejectedError(
                f"--{name.replace('_', '-')} without GPUs", fix="add --gpus-per-node G"
            )
    for name in ("ranks_per_node", "cpus_per_rank"):
        if getattr(arguments, name) and gpus:
            raise RejectedError(
                f"--{name.replace('_', '-')} with --gpus-per-node",
                fix="leave it out: every GPU gets one rank",
            )


def spec_of(arguments: argparse.Namespace) -> JobSpec:
    """The job that would be run."""
    from mdattn_mpi.runner.jobspec import JobSpec

    given = vars(arguments)
    options = {each.name: given[each.name] for each in fields(JobSpec) if each.name in given}
    for name in ("allow", "ignore"):
        options[name] = tuple(options[name] or ())
    return JobSpec(**options, backend="auto" if arguments.gpus_per_node else "cpu")


def neighbours(nodes: int, per_node: int) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """Nodes and ranks a node for half as many, None where there is no half, and twice as many."""
    half = None
    if nodes % 2 == 0:
        half = nodes // 2, per_node
    elif per_node % 2 == 0:
        half = nodes, per_node // 2
    larger = nodes == 1 and 2 * per_node <= LARGEST_NODE
    return half, (nodes, 2 * per_node) if larger else (2 * nodes, per_node)


def _possible(
    prospect: Prospect, size: tuple[int, int] | None, group_size: str, hardware: Hardware
) -> Forecast | None:
    """Forecast another size; None where the job can't be done so."""
    from mdattn_mpi.planning.forecast import forecast

    if size is None:
        return None
    try:
        return forecast(prospect.work, *size, group_size, hardware)
    except RejectedError:
        return None


def submit_words(arguments: argparse.Namespace, spec: JobSpec, plan: Forecast) -> list[str]:
    """The command that submits the job, with room in its time limit."""
    minutes = 5 * ceil((1.5 * plan.seconds + 300) / 300)
    ranks = ["--gpus-per-node", arguments.gpus_per_node]
    if not arguments.gpus_per_node:
        ranks = ["--ranks-per-node", plan.per_node, "--cpus-per-rank", arguments.cpus_per_rank or 1]
    words = [
        *("mdattn", "submit", spec.data, "-o", spec.output or "out.h5"),
        *("--nodes", plan.nodes, *ranks, "--time", f"{minutes // 60:02}:{minutes % 60:02}:00"),
        *("--run", *([] if arguments.gpus_per_node else ["-b", "cpu"])),
    ]
    for each in fields(spec):
        value, option = getattr(spec, each.name), f"--{each.name.replace('_', '-')}"
        if each.name not in SAME and value != each.default:
            words += [option] if value is True else _pairs(option, value)
    return [str(word) for word in words]


def _pairs(option: str, value: Any) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    return [word for one in values for word in (option, one)]


def _facts(
    spec: JobSpec,
    prospect: Prospect,
    plans: Sequence[Forecast],
    asked: int,
    submit: Sequence[str],
) -> dict[str, Any]:
    return {
        "path": spec.data,
        "items": len(prospect.work.problems),
        "output_bytes": prospect.output,
        "plans": [
            {
                "nodes": plan.nodes,
                "ranks_per_node": plan.per_node,
                "seconds": plan.seconds,
                "starting_seconds": plan.starting,
                "waits_for": plan.bound,
                "gpu_memory_bytes": plan.memory,
                "host_memory_bytes": plan.host_memory,
                "items_by_group_size": {
                    queue.size: len(queue.items) for queue in plan.schedule.queues
                },
                "groups": plan.schedule.reasons,
            }
            for plan in plans
        ],
        "asked": asked,
        "submit": shlex.join(submit),
        "notes": prospect.notes,
    }


def _lines(
    arguments: argparse.Namespace,
    prospect: Prospect,
    asked: Forecast,
    plans: Sequence[Forecast],
    submit: Sequence[str],
) -> Iterator[str]:
    tokens = [problem.tokens for problem in prospect.work.problems]
    lengths = f"{min(tokens)}…{max(tokens)}" if min(tokens) < max(tokens) else f"{tokens[0]}"
    yield wrapped(f"{arguments.data}: {counted(len(tokens), 'item')} of {lengths} tokens")
    yield from (wrapped(f"  {shape}", "    ") for shape in prospect.shapes)
    yield ""
    yield from _table(plans, arguments.gpus_per_node > 0, arguments.cpus_per_rank or 1)
    yield ""
    yield f"output    {quantity(prospect.output, 'B')}"
    yield from (_entry("groups", reason) for reason in asked.schedule.reasons)
    yield from (_entry("note", note) for note in prospect.notes)
    yield from _command(submit)


def _entry(name: str, text: str) -> str:
    return wrapped(f"{name:<10}{text}", " " * 10)


def _command(words: Sequence[str]) -> Iterator[str]:
    """A command in lines that a shell joins."""
    line = ""
    for word in map(shlex.quote, words):
        if line and len(line) + len(word) + 3 > COLUMNS:
            yield f"{line} \\"
            line = "   "
        line = f"{line} {word}" if line else word
    yield line


def _table(plans: Sequence[Forecast], gpus: bool, cores: int) -> Iterator[str]:
    """A column a plan."""
    noun, device = ("GPU", "GPU") if gpus else ("rank", "core")
    rows: Mapping[str, Callable[[Forecast], str]] = {
        "": lambda plan: counted(plan.ranks, noun),
        "nodes": lambda plan: str(plan.nodes),
        "time to the end": lambda plan: duration(plan.seconds),
        "before the first item": lambda plan: duration(plan.starting),
        "waits for": lambda plan: plan.bound,
        f"{device} hours": lambda plan: f"{plan.seconds * plan.ranks * cores / 3600:.2g}",
        "GPU memory a rank": lambda plan: memory_size(plan.memory) if gpus else "",
        "host memory a node": lambda plan: memory_size(plan.host_memory),
        "items on ranks": _sizes,
    }
    table = [[name, *map(cell, plans)] for name, cell in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in (row for row in table if any(row[1:])):
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "   ".join([name.ljust(widths[0]), *right])


def _sizes(plan: Forecast) -> str:
    """How many items on groups of how many ranks."""
    queues = plan.schedule.queues
    if len(queues) > 2:
        return f"on {queues[-1].size} to {queues[0].size}"
    return ", ".join(f"{len(queue.items)} on {queue.size}" for queue in queues)
