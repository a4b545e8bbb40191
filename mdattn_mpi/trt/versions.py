"""Which versions of TensorRT do what wrong, as data: the one place that knows.

`mdattn doctor` and `mdattn build` say it, networks take the way round where there is one, and an
error in which the library says one of these words is explained by it. Nothing is believed for being
in this table, or for not being in it: what an engine gives is proven before it is used (`proof`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Flavour = Literal["tensorrt", "tensorrt_rtx"]
Version = tuple[int, ...]
WayRound = Literal["", "border", "wide"]

COLLECTIVES = ("allgather", "ulysses")
USE_CUDA = "use -b cuda"


class Form(NamedTuple):
    """How a network is written, where there are several ways to say the same.

    ``border``: what is exchanged is cast to float32 before and back after, so that the builder
    keeps the collective out of what it fuses with the attention; twice the bytes travel.
    ``wide``: query, key and value are cast to float32 around the attention, which the builder takes
    as the wish to sum in float32.
    """

    border: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Fault:
    """Something that some versions do wrong.

    Attributes
    ----------
    name, what
        In a word, and in a sentence without its dot.
    since, fixed
        The first version that has it, and the first that hasn't; None where none is known.
    strategies
        Those of ours that it would make wrong; none where nothing of ours can meet it.
    words
        A regular expression for what the library says when it happens.
    way_round, at_once
        Which `Form` avoids it, and whether it is taken at once, or only after the builder has
        failed in these words.
    fix
        What a user can do where nothing avoids it.
    source
        Who reported it.

    """

    name: str
    what: str
    since: Version
    fixed: Version | None
    strategies: tuple[str, ...]
    source: str
    flavours: tuple[Flavour, ...] = ("tensorrt",)
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    words: str = ""
    way_round: WayRound = ""
    at_once: bool = True
    fix: str = USE_CUDA

    def concerns(self, flavour: str, version: str) -> bool:
        """Whether a library has it."""
        here = parse_version(version)
        return (
            flavour in self.flavours
            and self.since <= here
            and (self.fixed is None or here < self.fixed)
        )

    def __str__(self) -> str:
        """For example ``single-device engine: … (pytorch/TensorRT #4381)``."""
        return f"{self.name}: {self.what} ({self.source})"


FAULTS: tuple[Fault, ...] = (
    Fault(
        name="single-device engine",
        what="the attention's rank count overwrites that of the collectives; the engine is loaded "
        "as one of a single device, and its collectives do nothing",
        since=(11,),
        fixed=(11, 2),
        strategies=COLLECTIVES,
        words=r"not a multi-device engine|mIsMdEngine",
        way_round="border",
        fix="use TensorRT 11.2 or later, or -b cuda",
        source="pytorch/TensorRT #4381, #4388",
    ),
    Fault(
        name="fused collective",
        what="the builder fuses a collective with its neighbours and has no kernel for that",
        since=(11,),
        fixed=None,
        strategies=COLLECTIVES,
        words=r"toMyelinCommKind|CollectiveOperation.*not supported",
        way_round="border",
        at_once=False,  # it doubles what travels, and small networks are seldom fused
        fix="use another strategy, another TensorRT, or -b cuda",
        source="pytorch/TensorRT #4381",
    ),
    Fault(
        name="lost communicator",
        what="an execution context that was made anew has no communicator, and its collectives do "
        "nothing",
        since=(11,),
        fixed=None,
        strategies=(),  # an engine of ours has one context, and is held to it
        flavours=("tensorrt", "tensorrt_rtx"),
        words=r"Invalid communicator ID",
        fix="this is a bug of mdattn: please report it; meanwhile use -b cuda",
        source="pytorch/TensorRT #4464",
    ),
    Fault(
        name="ignored groups",
        what="a collective's list of ranks is ignored: it takes in all ranks of the communicator",
        since=(11, 2, 1),
        fixed=None,
        strategies=(),  # no network of ours has such a list: each group has its own communicator
        words=r"Did not properly set the child communicator",
        fix="build the engine for all ranks of its communicator",
        source="pytorch/TensorRT #4380",
    ),
    Fault(
        name="sequential handshake",
        what="setCommunicator returns when all ranks have called it: one after another never do",
        since=(11,),
        fixed=None,
        strategies=(),  # ours call it at once
        flavours=("tensorrt", "tensorrt_rtx"),
        fix="start the job again; if it happens again, please report it",
        source="triton-inference-server/tensorrt_backend #121",
    ),
    Fault(
        name="FP16 accumulation",
        what="fused attention in FP16 sums in FP16",
        since=(11,),
        fixed=(11, 3),
        strategies=("ring", *COLLECTIVES),
        dtypes=("float16",),
        fix="use TensorRT 11.3 or later, --dtype bf16, or -b cuda",
        source="TensorRT 11.3 release notes",
    ),
    Fault(
        name="FP16 accumulation unless cast up",
        what="fused attention in FP16 sums in FP16 where query, key and value aren't cast up",
        since=(11, 3),
        fixed=None,
        strategies=("ring", *COLLECTIVES),
        dtypes=("float16",),
        way_round="wide",
        source="TensorRT 11.3 release notes",
    ),
)


def parse_version(text: str) -> Version:
    """Read the numbers that ``11.2.0.86-md-moe`` begins with; none for what begins otherwise."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()


def faults_of(flavour: str, version: str, strategy: str = "", dtype: str = "") -> Iterator[Fault]:
    """Give the known faults of a library that concern what it is used for."""
    for fault in FAULTS:
        if (
            fault.concerns(flavour, version)
            and (not strategy or strategy in fault.strategies)
            and (not dtype or dtype in fault.dtypes)
        ):
            yield fault


def form_for(flavour: str, version: str, strategy: str, dtype: str, ranks: int) -> Form:
    """Choose how the network of an attention is written, so that known faults don't show."""
    ways = {
        fault.way_round
        for fault in faults_of(flavour, version, strategy, dtype)
        if fault.at_once and (ranks > 1 or fault.way_round == "wide")
    }
    return Form(border="border" in ways, wide="wide" in ways)


def fault_named(name: str) -> Fault:
    """Find a fault by its name; raise KeyError for what is none."""
    return {fault.name: fault for fault in FAULTS}[name]


def recognize(words: str, flavour: str, version: str) -> Fault | None:
    """Find the fault that the library's own words tell of, whatever its version says."""
    told = [fault for fault in FAULTS if fault.words and re.search(fault.words, words, re.I)]
    told.sort(key=lambda fault: not fault.concerns(flavour, version))
    return told[0] if told else None
