"""Which engine does which calls: by constants, so that all ranks and a resumed job choose alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mdattn_mpi.devices.cuda.attention import ONE, AttentionCall, Engine
from mdattn_mpi.devices.cuda.flash.engine import why_not
from mdattn_mpi.devices.presence import gpu_count, gpu_sm
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import KERNEL_NAMES

# cuDNN's time over FlashAttention's, by the major number of the SM architecture and head dim: on an
# H200, 64k to 128k tokens, the smaller of full and causal. What isn't here wasn't measured.
GAIN: dict[int, dict[int, float]] = {9: {64: 1.21, 128: 1.09, 256: 1.11}}

# For which wishes a call may have many documents: it was right in single calls on an H200, but
# strategies haven't run it there, nor recorded it, so one has to ask.
PACKED_BY = ("flash",)


class Choice(NamedTuple):
    """An engine, and why it was taken.

    `float32`: it can leave partial results in float32; `packs`: a call may have many documents.
    """

    engine: Engine
    float32: bool
    packs: bool
    reason: str


class Chooser:
    """The engines of this rank's GPU, and which of them takes a call.

    Parameters
    ----------
    wanted
        What the user asked for.
    engines
        By name; the same on all ranks of the group.
    sm
        The compute capability.
    missing
        Why the engine that is faster here isn't among them; empty where it is.

    """

    def __init__(
        self,
        wanted: str,
        engines: Mapping[str, Engine],
        sm: tuple[int, int],
        missing: str = "",
    ) -> None:
        self._wanted, self._sm, self._missing = wanted, sm, missing
        self.engines = dict(engines)
        self._chosen: dict[tuple[object, ...], Choice] = {}

    def choose(self, call: AttentionCall) -> Choice:
        """Choose for all calls of this kind, whatever their lengths and bounds.

        Raises
        ------
        RejectedError
            No engine can do it, or not the one that was asked for.

        """
        bounded = [bound is not None for bound in call.band]
        kind = (*call[2:7], call.mask, *bounded, call.softcap > 0)
        if kind not in self._chosen:
            plain = call._replace(out_dtype=call.dtype, documents=ONE)
            self._chosen[kind] = self._choose(plain)
        return self._chosen[kind]

    @property
    def first(self) -> Engine:
        """The engine that most calls go to."""
        if self._wanted == "auto":
            takes_flash = self._sm[0] in GAIN and "flash" in self.engines
            return self.engines["flash" if takes_flash else "cudnn"]
        return self.engines[self._wanted]

    def describe(self) -> str:
        """For example ``flash 4.0.0b36, else cudnn 9.19``."""
        others = () if self._wanted != "auto" else self.engines.values()
        engines = dict.fromkeys([self.first, *others])
        return ", else ".join(f"{each.name} {each.version}" for each in engines)

    def _choose(self, call: AttentionCall) -> Choice:
        refusals: list[str] = []
        for engine, why in self._candidates(call):
            refusal = engine.refusal(call)
            if not refusal:
                partial = call._replace(out_dtype="float32")
                packed = call._replace(documents=((0, call.q_tokens), (0, call.kv_tokens)))
                reason = "; ".join((f"{engine.name}: {why}", *refusals))
                packs = self._wanted in PACKED_BY and not engine.refusal(packed)
                return Choice(engine, not engine.refusal(partial), packs, reason)
            refusals.append(f"not {engine.name}: {refusal}")
        if self._missing:
            refusals.append(f"not flash: {self._missing}")
        major, minor = self._sm
        others = [name for name in KERNEL_NAMES if name != self._wanted]
        fix = "-b cpu" if self._wanted == "auto" else f"--kernel {others[0]}, or -b cpu"
        odd = any(dim % 8 for dim in (call.head_dim, call.v_head_dim))
        raise RejectedError(
            f"no attention kernel for head dims {call.head_dim} and {call.v_head_dim} in "
            f"{call.dtype}{_options(call)} on this GPU (SM {major}.{minor}): {'; '.join(refusals)}",
            fix=f"use {'head dims that are multiples of 8, ' if odd else ''}{fix}",
        )

    def _candidates(self, call: AttentionCall) -> Sequence[tuple[Engine, str]]:
        """Return the engines to try, the fastest first, and why."""
        cudnn, gains = self.engines["cudnn"], GAIN.get(self._sm[0])
        sm = f"SM {self._sm[0]}.{self._sm[1]}"
        if self._wanted != "auto":
            built = self._wanted == "flash" and gains is None
            why = f"asked for; built for {sm}, never executed there" if built else "asked for"
            return [(self.engines[self._wanted], why)]
        if gains is None:
            return [(cudnn, f"flash wasn't measured on {sm}")]
        if "flash" not in self.engines:
            return [(cudnn, f"flash would be faster, but {self._missing}")]
        nearest = min(gains, key=lambda dim: abs(dim - call.head_dim))
        gain = gains[nearest]
        why = f"{gain:.2f} × cudnn's speed on {sm}, measured with head dim {nearest}"
        return [(self.engines["flash"], why), (cudnn, "the other kernel")]


def _options(call: AttentionCall) -> str:
    """Say what else a call wants of a kernel."""
    band = ", with a window" if call.mask == "band" else ""
    return f"{band}, with a soft cap" if call.softcap else band


def needs_no_preparing(kernel: str) -> bool:
    """Whether no length of this rank's calls needs preparing; its GPU needn't be open."""
    return gpu_count() > 0 and takes_flash(kernel, gpu_sm(0))


def takes_flash(kernel: str, sm: tuple[int, int]) -> bool:
    """Whether most calls go to FlashAttention on such a GPU, with what is installed here."""
    wanted = kernel == "flash" or (kernel == "auto" and sm[0] in GAIN)
    return wanted and not why_not(sm)
