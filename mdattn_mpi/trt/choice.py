"""Which strategy for which problem, and why, before anything is built."""

from __future__ import annotations

from mdattn_mpi.errors import DeviceError, MdattnError, RejectedError
from mdattn_mpi.problem import AttentionProblem, StrategyName
from mdattn_mpi.trt.library import SM, Capabilities, Library, show_sm
from mdattn_mpi.trt.networks import network_of
from mdattn_mpi.trt.spec import refuse_everywhere

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
            network_of(name).refuse(problem, ranks)
        except MdattnError as error:
            tried.append(error)
            continue
        asked = ("asked for",) if strategy != "auto" else ()
        return name, (*asked, *(f"not {error.what}" for error in tried))
    if len(tried) == 1:
        raise tried[0]
    raise type(tried[-1])("; ".join(error.what for error in tried), fix="use -b cuda or -b cpu")


def check_target(library: Library, strategy: str, ranks: int, sm: SM) -> None:
    """Refuse a GPU on which an engine of `strategy` couldn't run, before anything is built.

    Raises
    ------
    DeviceError
        Naming the SM, the library and what would work.

    """
    can = library.capabilities(sm)
    if can.collectives and (can.ring or strategy != "ring" or ranks == 1):
        return
    raise DeviceError(
        f"{strategy} can't run on a GPU of SM {show_sm(sm)} with {library}: {can.reason}",
        fix=_what_works(library, can, sm),
    )


def _what_works(library: Library, can: Capabilities, sm: SM) -> str:
    if can.collectives:
        return "use -s allgather or -s ulysses, -b cuda -s ring, or full TensorRT since SM 10.0"
    if library.flavour == "tensorrt_rtx" and sm >= (8, 0):
        return "use -b cuda, or full TensorRT: pip install 'mdattn_mpi[tensorrt]'"
    return "use -b cpu, or a GPU of SM 8.0 or later"
