"""What callers say of the attention that they want, checked."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.library.spans import Order, check_order
from mdattn_mpi.mask import UNBOUNDED, starts_of, window_of
from mdattn_mpi.problem import (
    KERNEL_NAMES,
    STRATEGY_NAMES,
    Causal,
    KernelName,
    StrategyName,
    scale_of,
    softcap_of,
)


class Options(NamedTuple):
    """What is to be computed of the arrays, and how; as the caller says it."""

    causal: Causal
    scale: float | None
    strategy: Literal["auto"] | StrategyName
    kernel: Literal["auto"] | KernelName
    order: Order
    return_lse: bool
    window: tuple[int, int] = UNBOUNDED
    softcap: float = 0.0
    sinks: bool = False
    segments: tuple[int, ...] = ()

    def checked(self) -> Options:
        """Return the same with plain numbers.

        Raises
        ------
        RejectedError
            An invalid value; says what to write instead.

        """
        check_order(self.order)
        _check_causal(self.causal)
        _check_name("strategy", self.strategy, STRATEGY_NAMES)
        _check_name("kernel", self.kernel, KERNEL_NAMES)
        scale = None if self.scale is None else scale_of(self.scale)
        return self._replace(
            scale=scale,
            return_lse=bool(self.return_lse),
            window=window_of(self.window),
            softcap=softcap_of(self.softcap),
            segments=starts_of(self.segments),
        )


def _check_name(option: str, given: object, names: tuple[str, ...]) -> None:
    if given not in ("auto", *names):
        raise RejectedError(f"{option} is {given!r}", fix=f"use auto, {', '.join(names)}")


def _check_causal(causal: object) -> None:
    allowed = get_args(Causal)
    if isinstance(causal, str) and causal in allowed:
        return
    fix = f"use {', '.join(allowed)}"
    if isinstance(causal, bool):
        fix = f'write causal="{"upper_left" if causal else "none"}"'
        if causal:
            fix += " (query i sees keys 0 to i), or lower_right, where both ends meet"
    raise RejectedError(f"causal is {causal!r}", fix=fix)
