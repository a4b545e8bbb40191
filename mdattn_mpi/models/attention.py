"""What stands in for the attention of every layer: registered with Transformers under one name.

Transformers calls an attention function with a module, its queries, keys and values, and options
(``AttentionInterface``, huggingface.co/docs/transformers/attention_interface), and asks for the
mask beforehand. Here no mask is made: who sees whom follows from the options, and from which tokens
the rank holds. What answers is set for a while by `attending`: our strategies, or what the proof
wants to see instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.library.arrays import shards_of
from mdattn_mpi.partition import token_count
from mdattn_mpi.problem import (
    AttentionProblem,
    DTypeName,
    Partition,
    Plan,
    Span,
    StrategyName,
)

if TYPE_CHECKING:
    import torch

    from mdattn_mpi.backends import AnyDevice

NAME = "mdattn"
StrategyWish = Literal["auto"] | StrategyName

# Options that say nothing about what is computed: without a cache, dropout or gradients.
SILENT = frozenset(
    {"position_ids", "cache_position", "deterministic", "dropout", "use_cache", "output_attentions"}
)


class Attending(Protocol):
    """What can stand in for the attention of all layers."""

    def mask(self, *args: Any, **options: Any) -> Any:
        """Make the mask that `attend` will be given; arguments as Transformers has them."""
        ...

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **options: Any,
    ) -> torch.Tensor:
        """Attend ``[1, N, S, H]`` to ``[1, Nkv, S, H]``; return ``[1, S, N, Hv]``."""
        ...


_attending: ContextVar[Attending] = ContextVar("attending")


@contextmanager
def attending(by: Attending) -> Iterator[None]:
    """Let `by` do the attention of models that were loaded for ours, within the block."""
    before = _attending.set(by)
    try:
        yield
    finally:
        _attending.reset(before)


def register() -> None:
    """Make our attention known to Transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    return _current().attend(module, query, key, value, mask, **options), None


def _mask(*args: Any, **options: Any) -> Any:
    return _current().mask(*args, **options)


def _current() -> Attending:
    by = _attending.get(None)
    if by is None:
        raise RejectedError(
            "a model was called on its own whose attention all ranks compute together",
            fix="call it on all ranks, by `mdattn run` or mdattn_mpi.transformers.parallelize",
        )
    return by


class Options(NamedTuple):
    """What a layer asks for, in our words."""

    causal: bool
    scale: float | None
    window: int | None  # keys that a token sees on a side, itself among them
    softcap: float | None
    sinks: Any  # [N], or None


def options_of(module: Any, mask: Any, options: Mapping[str, Any]) -> Options:
    """Read a layer's options; all that isn't known is refused by name.

    Raises
    ------
    RejectedError
        It asks for what we can't do: says which layer's class, and what.

    """
    left = {name: value for name, value in options.items() if value is not None}
    causal = left.pop("is_causal", None)
    if causal is None:
        causal = getattr(module, "is_causal", True)
    found = Options(
        bool(causal),
        left.pop("scaling", None),
        left.pop("sliding_window", None),
        left.pop("softcap", None) or None,
        left.pop("s_aux", None),
    )
    if found.window is not None and not (isinstance(found.window, int) and found.window > 0):
        raise RejectedError(
            f"{type(module).__name__} has a window (sliding_window) of {found.window} tokens",
            fix="write a number above 0 into the model's config.json, or null for none",
        )
    dropout = left.get("dropout", 0.0)
    unknown = sorted(name for name in left if name not in SILENT)
    if mask is not None:
        unknown.append("a mask")
    if dropout:
        unknown.append(f"dropout {dropout}")
    if unknown:
        raise RejectedError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which ranks "
            "can't compute together",
            fix="use another model, or `mdattn shard` on an ONNX export of this one",
        )
    return found


class Layer(NamedTuple):
    """What an attention layer computes, whatever the sequence."""

    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: DTypeName
    causal: bool
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: bool

    def over(self, tokens: int, segments: Sequence[int] = ()) -> AttentionProblem:
        """Say what it computes over a sequence; `segments` are where its documents begin."""
        before = -1 if self.window is None else self.window - 1
        return AttentionProblem(
            tokens,
            tokens,
            self.q_heads,
            self.kv_heads,
            self.head_dim,
            self.v_head_dim,
            self.dtype,
            "upper_left" if self.causal else "none",
            self.scale,  # type: ignore[arg-type]
            window=(before, -1 if self.causal else before),
            softcap=self.softcap or 0.0,
            sinks=self.sinks,
            segments=tuple(segments),
        )


@dataclass
class SharedAttention:
    """Our strategies, over a group that holds one sequence together.

    Parameters
    ----------
    device
        The rank's place in the group.
    backend
        The device's name, as users type it.
    owners
        The tokens of each rank, the same in all layers.
    strategy
        One of ours, or ``auto``.
    segments
        The first tokens of the documents that are packed into the sequence.
    reserved
        Bytes of the device that are the model's own.

    Attributes
    ----------
    layers
        What was asked for so far, and how often.

    """

    device: AnyDevice
    backend: str
    owners: tuple[tuple[Span, ...], ...]
    strategy: StrategyWish = "auto"
    segments: tuple[int, ...] = ()
    reserved: int = 0
    layers: Counter[Layer] = field(default_factory=Counter)
    _plans: dict[Layer, Plan] = field(default_factory=dict)

    def mask(self, *args: Any, **options: Any) -> None:
        """Make none."""

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> Any:
        """Collective. Attend with the rank's own tokens to those of all ranks."""
        wanted = options_of(module, mask, options)
        own = token_count(self.owners[self.device.rank])
        rows = query.shape[2]
        if query.shape[0] != 1 or key.shape[2] != rows or rows != max(own, 1):
            raise RejectedError(
                f"{type(module).__name__} attends {list(query.shape)} to {list(key.shape)}; the "
                f"rank holds {own} tokens of one sequence",
                fix="use a model whose every layer attends from all of a sequence to all of it",
            )
        q, k, v = (tensor[0, :, :own].transpose(0, 1) for tensor in (query, key, value))
        out = self._attend(q, k, v, wanted)
        if own < rows:  # a rank without tokens runs the model on one of no meaning
            out = query.new_zeros((rows, query.shape[1], value.shape[3]))
        return out.unsqueeze(0)

    def _attend(self, q: Any, k: Any, v: Any, wanted: Options) -> Any:
        """Collective. Run a strategy to its end over ``[S, N, H]``."""
        from mdattn_mpi.strategies import attend_alone

        shards = shards_of(q, k, v)
        layer = Layer(
            q_heads=shards.q.shape[1],
            kv_heads=shards.k.shape[1],
            head_dim=shards.k.shape[2],
            v_head_dim=shards.v.shape[2],
            dtype=shards.dtype,
            causal=wanted.causal,
            scale=wanted.scale,
            window=wanted.window,
            softcap=wanted.softcap,
            sinks=wanted.sinks is not None,
        )
        self.layers[layer] += 1
        plan = self.plan(layer)
        given = [*shards[:3]]
        if wanted.sinks is not None:
            sinks = wanted.sinks.detach().float()
            given.append(sinks.numpy() if self.backend == "cpu" else sinks)
        out, _ = attend_alone(self.device, plan, *map(self.device.adopt, given))
        return shards.give(self.device.export(out))

    def plan(self, layer: Layer) -> Plan:
        """Choose how the group computes a layer, once for all that are alike.

        Raises
        ------
        RejectedError
            The device or the strategy can't.

        """
        if layer not in self._plans:
            from mdattn_mpi.strategies import choose

            problem = layer.over(sum(map(token_count, self.owners)), self.segments)
            ranks, both = len(self.owners), Partition(self.owners, self.owners)
            kernel = self.device.check(problem)
            costs = self.device.costs(problem)
            if costs.memory:
                costs = replace(costs, memory=max(1, costs.memory - self.reserved))
            name, reasons = choose(problem, ranks, self.strategy, costs, batch=False, owners=both)
            reasons = (*reasons, *kernel)
            self._plans[layer] = Plan(
                problem,
                name,
                ranks,
                self.backend,
                partition=both,
                node_size=costs.node_size,
                reasons=reasons,
            )
        return self._plans[layer]
