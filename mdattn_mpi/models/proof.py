"""Proof before the job: a short sequence on all ranks against the whole of it on one.

With the model's own weights and random tokens, at the output of every attention and at the end:

- *attention*: each layer's own queries, keys and values, ours on all ranks against the model's own
  attention, in float32, with the model's own mask. What an option or a mask means shows here.
- *model*: all ranks' run from end to end against one process's. What mixes tokens between the
  attentions shows here, and so do wrong positions. Rounding adds up from layer to layer, which the
  same model in one process, with its attention in 16 bits instead of float32, measures.
- *control*: both once more, with attention inside each rank only. A wrong answer has to look wrong:
  where it doesn't, nothing was proved.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.models.attention import Attending, Layer, SharedAttention, StrategyWish
from mdattn_mpi.models.pieces import PIECE
from mdattn_mpi.models.sequence import ONE_DOCUMENT, Ids, TokenSequence, owners_of
from mdattn_mpi.problem import Plan, Span
from mdattn_mpi.text import counted

if TYPE_CHECKING:
    from mdattn_mpi.backends import AnyDevice
    from mdattn_mpi.lockstep import Group
    from mdattn_mpi.models.network import Network

# Relative L2 error that rounding explains: what 16-bit kernels, merges and outputs add up to.
ROUNDING = {"bfloat16": 2.0**-6, "float16": 2.0**-9}
NOISE = 4.0  # times what one process's own rounding makes of it
CONTROL = 10.0  # times the error that a wrong answer must differ
LONGEST = 8192  # tokens of the probe: the whole of it runs on one rank, with a mask
WINDOWS = ("sliding_window", "local_attention", "attention_chunk_size", "window_size")
SMALL_PIECE = 7  # tokens that an MLP takes at a time, so that the probe has many pieces
MOST_PLACES = 4096
_ANOTHER = "use another model"


@dataclass(frozen=True)
class Place:
    """Where two runs were compared, and by how much they part, relative to what should come out.

    ``control`` is None where a single rank has nothing to leave out.
    """

    name: str
    error: float
    allowed: float
    control: float | None

    @property
    def parts(self) -> bool:
        """Whether it is more than rounding."""
        return not self.error <= self.allowed

    @property
    def inconclusive(self) -> bool:
        """Whether a wrong answer would have looked right."""
        enough = max(CONTROL * self.error, self.allowed)
        return self.control is not None and not self.control > enough


@dataclass(frozen=True)
class Proof:
    """What a proof found, and of how many tokens."""

    tokens: int
    ranks: int
    places: Sequence[Place]
    layers: Mapping[Layer, int]  # what the model asks its attentions for, and how often
    unseen: Sequence[str] = field(default=())  # what the probe is too short for

    def check(self) -> None:
        """Refuse a model whose ranks don't compute together what one process computes.

        Raises
        ------
        RejectedError
            Names the first place that parts.

        """
        wrong = next((place for place in self.places if place.parts), None)
        if wrong is not None:
            raise RejectedError(
                f"the model on {counted(self.ranks, 'rank')} isn't the model in one process: at "
                f"{wrong.name} they part by {wrong.error:.2g}, where rounding explains "
                f"{wrong.allowed:.2g} ({self.tokens} random tokens)",
                fix="use another model: something in this one mixes tokens in a way that isn't "
                "understood, in its attention or beside it",
            )

    def describe(self) -> tuple[str, ...]:
        """Say what was proved, and what wasn't."""
        worst = max(self.places, key=lambda place: place.error / place.allowed)
        told = [
            f"proof: {len(self.places)} places of {self.tokens} random tokens on "
            f"{counted(self.ranks, 'rank')} as in one process; worst {worst.name}, "
            f"{worst.error:.2g} of {worst.allowed:.2g} allowed"
        ]
        if self.ranks > 1:
            told[0] += f"; attention inside each rank only would be {self._least():.2g} off"
        vague = [place for place in self.places if place.inconclusive]
        for place in vague[:3]:
            told.append(
                f"proof inconclusive at {place.name}: attention inside each rank only differs by "
                f"{place.control:.2g}, the right one by {place.error:.2g}: it hardly matters there "
                "which tokens are seen"
            )
        if len(vague) > 3:
            told.append(f"proof inconclusive at {len(vague) - 3} more places")
        told += [f"proof inconclusive: {what}" for what in self.unseen]
        return tuple(told)

    def _least(self) -> float:
        return min(place.control for place in self.places if place.control is not None)


def prove(
    network: Network, device: AnyDevice, backend: str, group: Group, strategy: StrategyWish
) -> Proof:
    """Collective. Compare; see the module.

    Raises
    ------
    RejectedError
        A layer asks for what isn't known, has no attention of its own to be compared with, or can't
        be run so. What parts is refused by `Proof.check`.

    """
    try:
        return _prove(network, device, backend, group, strategy)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise RejectedError(
            f"{network.name} can't be run on some of a sequence's tokens: {error}",
            fix="use another model: layers of this one want more than tokens and their positions",
        ) from error
    finally:
        network.release()  # long items want other sizes


def _prove(
    network: Network, device: AnyDevice, backend: str, group: Group, strategy: StrategyWish
) -> Proof:
    """Collective. Run the probe four times: as it is, rounded, shared, and without each other."""
    tokens, unseen = probe_length(network.config, group.size, network.longest)
    ids = probe_ids(network.config, network.vocabulary, tokens)
    owners = owners_of(tokens, group.size, network.causal)
    sequence = TokenSequence(ids, ONE_DOCUMENT, owners[group.rank])
    shared = SharedAttention(device, backend, owners, strategy)
    alone = SharedAttention(_Alone(device), backend, ((Span(0, len(sequence.places)),),))

    network.pieces.tokens = 0
    own_way = _Reference(sequence.places, shared)
    right = network.run_as_it_is(ids, own_way)[sequence.places]
    rounded = _Followed(_Own(), own_way.outputs, sequence.places)
    rounded_end = network.run_as_it_is(ids, rounded)[sequence.places]

    layers = dict(shared.layers)
    network.pieces.tokens = SMALL_PIECE
    ours, control = (_Followed(by, own_way.outputs) for by in (shared, alone))
    ours_end, control_end = (network.run(sequence, each) for each in (ours, control))
    network.pieces.tokens = PIECE

    rows = [
        *own_way.squares,
        *zip(ours.squares, rounded.squares, control.squares, own_way.norms, strict=True),
        [*(_square(end - right) for end in (ours_end, rounded_end, control_end)), _square(right)],
    ]
    sums = group.sum_in_order(np.array([[float(each) for each in row] for row in rows]))
    names = own_way.names
    places = [
        *(f"the attention of layer {n} ({name})" for n, name in enumerate(names)),
        *(f"the model at the attention of layer {n} ({name})" for n, name in enumerate(names)),
        "the model's end",
    ]
    floor = ROUNDING[network.dtype]
    found = [_place(*each, floor, group.size) for each in zip(places, sums.tolist(), strict=True)]
    return Proof(tokens, group.size, found, layers, unseen)


def _place(name: str, squares: Sequence[float], floor: float, ranks: int) -> Place:
    """Make relative errors of sums of squares: ours, one process's rounding, control, norm."""
    ours, rounded, control, norm = np.sqrt(np.array(squares))
    relative = [
        float(each / norm) if norm else float(each > 0) for each in (ours, rounded, control)
    ]
    allowed = max(floor, NOISE * relative[1])
    return Place(name, relative[0], allowed, relative[2] if ranks > 1 else None)


def probe_length(
    config: Mapping[str, Any], ranks: int, longest: int
) -> tuple[int, tuple[str, ...]]:
    """Choose a length that no window covers and no number of ranks divides; and what it can't show.

    Windows longer than `LONGEST` or than the model's positions stay out of sight.
    """
    windows = {name: config[name] for name in WINDOWS if isinstance(config.get(name), int)}
    most = min(LONGEST, longest or LONGEST)
    wanted = max([8 * ranks + 41, *(size + size // 4 + 41 for size in windows.values())])
    tokens = min(wanted, most)
    unseen = tuple(
        f"{name} is {size}, and {tokens} tokens don't reach beyond it"
        for name, size in windows.items()
        if size >= tokens
    )
    while ranks > 1 and tokens % ranks == 0:
        tokens -= 1
    return tokens, unseen


def probe_ids(config: Mapping[str, Any], vocabulary: int, tokens: int) -> Ids:
    """Draw random ids, none with a meaning of its own such as padding; the same on all ranks."""
    special = [config[name] for name in config if name.endswith("_token_id")]
    flat = [n for each in special for n in (each if isinstance(each, list) else [each])]
    allowed = np.setdiff1d(np.arange(vocabulary), [n for n in flat if isinstance(n, int)])
    return np.random.default_rng(1).choice(allowed, tokens).astype(np.int64)


class _Alone:
    """A device of a group of one rank: attention inside each rank only, the negative control."""

    rank, ranks = 0, 1

    def __init__(self, device: AnyDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def perform(self, attend: Any, plan: Plan, *inputs: Any, **options: Any) -> Any:
        """Do what a strategy does alone; nothing is replayed."""
        return attend(self, plan, *inputs, **options)


class _Own:
    """The model's own attention, with its own masks, in one process."""

    def mask(self, *args: Any, **options: Any) -> Any:
        """Make the mask of Transformers' eager attention."""
        from transformers.masking_utils import AttentionMaskInterface

        return AttentionMaskInterface()["eager"](*args, **options)

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> Any:
        """Attend as the model does when it isn't told otherwise."""
        forward = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if forward is None:
            raise RejectedError(
                f"{type(module).__name__} has no attention of its own to be compared with",
                fix="use a model whose attention goes through Transformers' AttentionInterface",
            )
        return forward(module, query, key, value, mask, **options)[0]


class _Reference(_Own):
    """The same in float32; and ours with the same queries, keys and values, on all ranks."""

    def __init__(self, places: Ids, shared: SharedAttention) -> None:
        self.places, self.shared = places, shared
        self.names: list[str] = []
        self.outputs: list[Any] = []  # ``[1, own, N, Hv]`` of each attention
        self.norms: list[Any] = []
        self.squares: list[tuple[Any, ...]] = []  # ours, rounding, control, norm

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> Any:
        """Collective. Attend in one process; compare."""
        if len(self.outputs) == MOST_PLACES:
            raise RejectedError(f"more than {MOST_PLACES} attentions in one run", fix=_ANOTHER)
        rows = self.places
        q, k, v = (tensor.float() for tensor in (query, key, value))
        right = super().attend(module, q, k, v, mask, **options)
        q, k, v = (tensor[:, :, rows] for tensor in (q, k, v))
        own_mask = None if mask is None else mask[:, :, rows][..., rows]
        inside = super().attend(module, q, k, v, own_mask, **options)
        q, k, v = (tensor[:, :, rows] for tensor in (query, key, value))
        ours = self.shared.attend(module, q, k, v, None, **options)

        expected = right[:, rows]
        rounded = expected.to(query.dtype).float()
        self.names.append(type(module).__name__)
        self.outputs.append(expected)
        self.norms.append(_square(expected))
        parts = (_square(each - expected) for each in (ours.float(), rounded, inside))
        self.squares.append((*parts, self.norms[-1]))
        return right.to(query.dtype)


class _Followed:
    """Whoever attends, compared with what should come out."""

    def __init__(self, by: Attending, expected: Sequence[Any], places: Ids | None = None) -> None:
        self.by, self.expected, self.places = by, expected, places
        self.squares: list[Any] = []

    def mask(self, *args: Any, **options: Any) -> Any:
        """Ask for it."""
        return self.by.mask(*args, **options)

    def attend(self, module: Any, *arguments: Any, **options: Any) -> Any:
        """Attend, and compare the rank's own tokens."""
        out = self.by.attend(module, *arguments, **options)
        own = out if self.places is None else out[:, self.places]
        self.squares.append(_square(own.float() - self.expected[len(self.squares)]))
        return out


def _square(tensor: Any) -> Any:
    return tensor.double().square().sum()
