"""Which strategy and which engines for which problems, and why, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mdattn_mpi.errors import DeviceError, MdattnError, RejectedError
from mdattn_mpi.mask import UNBOUNDED
from mdattn_mpi.problem import AttentionProblem, StrategyName
from mdattn_mpi.text import install
from mdattn_mpi.trt.library import SM, Capabilities, Library, show_sm
from mdattn_mpi.trt.networks import NETWORKS
from mdattn_mpi.trt.spec import EngineSpec, Extent, Shapes

STRATEGIES: tuple[StrategyName, ...] = ("ring", "ulysses", "allgather")


def choose(
    problem: AttentionProblem, strategy: str, ranks: int, library: Library, sm: SM
) -> tuple[StrategyName, tuple[str, ...]]:
    """Take the strategy that the user named, or the best that can run.

    ``ring`` holds least memory and needs the newest GPUs; ``ulysses`` gives all ranks the same
    work under any mask; ``allgather`` takes any number of heads.

    Returns
    -------
    The strategy, and the reasons.

    Raises
    ------
    RejectedError, DeviceError
        No strategy of TensorRT can do it: the reason of each that was tried.

    """
    refuse_everywhere(problem)
    tried: list[MdattnError] = []
    for name in STRATEGIES if strategy == "auto" else (strategy,):
        if name not in STRATEGIES:
            raise RejectedError(f"strategy {strategy!r}", fix=f"use auto, {', '.join(STRATEGIES)}")
        try:
            check_target(library, name, ranks, sm)
            NETWORKS[name].refuse(problem, ranks)
        except MdattnError as error:
            tried.append(error)
            continue
        asked = ("asked for",) if strategy != "auto" else ()
        return name, (*asked, *(f"not {error.what}" for error in tried))
    if len(tried) == 1:
        raise tried[0]
    raise type(tried[-1])("; ".join(error.what for error in tried), fix="use -b cuda or -b cpu")


def check_target(library: Library, strategy: str, ranks: int, sm: SM) -> None:
    """Refuse a GPU on which an engine of `strategy` couldn't run, before anything is built."""
    can = library.capabilities(sm)
    if can.strategies and (strategy in can.strategies or ranks == 1):
        return
    raise DeviceError(
        f"{strategy} can't run on a GPU of SM {show_sm(sm)} with {library}: {can.reason}",
        fix=_what_works(library, can, sm),
    )


def _what_works(library: Library, can: Capabilities, sm: SM) -> str:
    if can.strategies:
        return "use -s allgather or -s ulysses, -b cuda -s ring, or full TensorRT since SM 10.0"
    if library.flavour == "tensorrt_rtx" and sm >= (8, 0):
        return f"use -b cuda, or full TensorRT: {install('tensorrt')}"
    return "use -b cpu, or a GPU of SM 8.0 or later"


def refuse_everywhere(problem: AttentionProblem) -> None:
    """Raise for what TensorRT's attention layer can't express under any strategy."""
    if problem.v_head_dim != problem.head_dim:
        raise RejectedError(
            f"value heads of {problem.v_head_dim} under query heads of {problem.head_dim}: "
            "TensorRT's attention takes one head dim",
            fix="use -b cuda or -b cpu",
        )
    masked = {
        "a window": problem.window != UNBOUNDED,
        "documents": bool(problem.segments),
        "a soft cap": bool(problem.softcap),
        "sinks": problem.sinks,
    }
    unknown = [name for name, there in masked.items() if there]
    if unknown:
        raise RejectedError(
            f"{' and '.join(unknown)}: our TensorRT engines know causal masks alone",
            fix="use -b cuda or -b cpu",
        )
    if problem.causal == "lower_right" and problem.q_tokens > problem.kv_tokens:
        raise RejectedError(
            f"lower_right with {problem.q_tokens} queries over {problem.kv_tokens} keys: the "
            "first queries see no key, and TensorRT divides by zero there",
            fix="use -b cuda or -b cpu",
        )


def spec_for(
    problems: Sequence[AttentionProblem], strategy: StrategyName, ranks: int
) -> tuple[EngineSpec, ...]:
    """Cover `problems` with as few engines as possible: one a kind, whatever the lengths."""
    network = NETWORKS[strategy]
    shapes: dict[Any, list[Shapes]] = {}
    for problem in problems:
        refuse_everywhere(problem)
        network.refuse(problem, ranks)
        kind = (
            problem.q_heads,
            problem.kv_heads,
            problem.head_dim,
            problem.dtype,
            network.mask(problem),
            problem.scale,
        )
        lengths = (network.shapes(problem, ranks, rank) for rank in range(ranks))
        shapes.setdefault(kind, []).extend(lengths)
    return tuple(
        EngineSpec(strategy, ranks, *kind, *map(Extent.over, zip(*lengths, strict=True)))
        for kind, lengths in shapes.items()
    )
