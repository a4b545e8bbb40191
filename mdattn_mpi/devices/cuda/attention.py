"""What an attention kernel is here: the interface that cuDNN and FlashAttention stand behind.

An `Engine` says what it can do, makes a launch for a call, and launches it on a stream with bare
addresses. Nobody else knows which engine a launch belongs to. What they can do::

                        cuDNN                                   FlashAttention 4
    any band            rows <= keys, bounds of 0 and above     yes
    soft cap            no                                      yes
    float32 output      no                                      yes
    packed documents    no                                      on SM 9.0

Sinks are no kernel's business: they are added when results are finished.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

from mdattn_mpi.mask import FULL, LOWER_RIGHT, Band

MaskKind = Literal["none", "causal", "band"]
Strides = tuple[int, ...]
# Where each document begins and the last one ends, in rows and in keys.
Documents = tuple[tuple[int, ...], tuple[int, ...]]
ONE: Documents = ((), ())


class AttentionCall(NamedTuple):
    """Everything that a launch depends on but addresses; strides are in elements.

    Arrays are ``[tokens, heads, dim]``, the LSE ``[tokens, heads]`` in float32. ``out_dtype`` is
    ``dtype``, or ``float32`` for a partial result that will be merged with others.
    Scores become ``softcap · tanh(score / softcap)``, unless it is 0.

    The rows of each of the `documents` see the keys of the same one, in a band of their own, as if
    it were a call of its own; `ONE` stands for no more than one.
    """

    q_tokens: int
    kv_tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    out_dtype: str
    band: Band
    scale: float
    softcap: float
    q: Strides
    k: Strides
    v: Strides
    output: Strides
    lse: Strides
    documents: Documents = ONE

    @property
    def mask(self) -> MaskKind:
        """Which kind of band it is."""
        if self.band == FULL:
            return "none"
        return "causal" if self.band == LOWER_RIGHT else "band"


class Launch(Protocol):
    """A call made ready: any number of runs, on any stream.

    Attributes
    ----------
    workspace
        Bytes that a run needs besides the arrays.

    """

    workspace: int

    def run(self, addresses: tuple[int, ...], workspace: int, stream: Any) -> None:
        """Attend: the addresses of query, key, value, output and LSE, in this order.

        Where the call has `documents`, two arrays of int32 follow, which say the same.
        """
        ...


class Engine(Protocol):
    """One library's attention kernels on this rank's GPU.

    Attributes
    ----------
    name, version
        What users call it, and which one it is.
    preparing
        Seconds that the first call of new lengths takes besides.

    """

    name: str
    version: str
    preparing: float

    def refusal(self, call: AttentionCall) -> str:
        """Say why it can't do a call of this kind on this GPU; empty where it can."""
        ...

    def prepare(self, call: AttentionCall) -> Launch:
        """Make `call` ready; any thread may ask.

        Raises
        ------
        RejectedError
            It can't be done.

        """
        ...

    def close(self) -> None:
        """Release everything."""
        ...
