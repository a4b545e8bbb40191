"""How long a strategy would take: its own code runs on arrays without contents, in virtual time.

`trace` runs the very generators of `strategies` on a device that only notes what it is asked to do.
`simulate` plays the notes of all ranks with measured times of the attention kernel and the rates of
the links: a verb starts once what it reads is there and what it uses (the rank's compute engine,
the ports of two ranks) is free. The host is taken to run ahead, as it does on a GPU, unless asking
takes longer than doing: `host_seconds`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod
from typing import Any, Literal, NamedTuple

from mdattn_mpi.devices.protocol import NO_ROWS, Message
from mdattn_mpi.mask import FULL, Band
from mdattn_mpi.partition import Block, partition_of, token_count
from mdattn_mpi.problem import Plan, Span
from mdattn_mpi.strategies import Attend

HALF, SINGLE = 2, 4  # bytes of a 16-bit number and of a float32


class Call(NamedTuple):
    """One attention call, as a kernel sees it."""

    q_rows: int
    kv_rows: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    band: Band = FULL


@dataclass(frozen=True)
class Timings:
    """What was measured of a device; 0 stands for what wasn't.

    Parameters
    ----------
    attend
        Seconds of every attention call that occurs.
    after
        The same where the device is still busy with another one, whose end leaves room for its
        beginning; calls that it doesn't have take as long as alone.
    bandwidth
        Bytes/s through a rank's port, each way.
    latency
        Seconds that a message takes besides.
    memory
        Bytes/s of copies inside the device, read and written ones.
    merge
        Bytes/s of merging, likewise.
    launch
        Seconds that a merge takes besides.
    host
        Seconds that the host needs to ask for one ``attend``, ``finish``, ``copy`` or ``message``
        (all that goes to one other rank at a time, and all that comes from one), or for a whole
        item at once, a ``replay``.

    """

    attend: Mapping[Call, float]
    bandwidth: float = 0.0
    latency: float = 0.0
    memory: float = 0.0
    merge: float = float("inf")
    launch: float = 0.0
    host: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[Call, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """An array without contents: a view of the buffer numbered `buffer`."""

    shape: tuple[int, ...]
    itemsize: int
    buffer: int

    @property
    def nbytes(self) -> int:
        """Bytes that its contents would take."""
        return prod(self.shape) * self.itemsize

    def __getitem__(self, index: Any, /) -> Shape:
        parts = index if isinstance(index, tuple) else (index,)
        cut = tuple(
            len(range(*part.indices(extent)))
            for part, extent in zip(parts, self.shape, strict=False)
        )
        return Shape(cut + self.shape[len(cut) :], self.itemsize, self.buffer)


class Compute(NamedTuple):
    """Work of the rank's compute engine: one attention call, or bytes through its memory."""

    kind: Literal["attend", "finish", "copy"]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    call: Call | None
    nbytes: int = 0


class Parcel(NamedTuple):
    """A message as one end posts it: `buffer` is read by the sender, written by the receiver."""

    peer: int
    buffer: int
    nbytes: int


class Exchange(NamedTuple):
    """Messages posted together."""

    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]


class Wait(NamedTuple):
    """From here on all that an exchange received counts as there, once the last of it is."""

    arrays: tuple[int, ...]


Verb = Compute | Exchange | Wait


@dataclass
class Tracer:
    """A device of one rank that notes what it is asked to do."""

    rank: int
    ranks: int
    verbs: list[Verb] = field(default_factory=list)
    _numbers: Any = field(default_factory=count)

    def array(self, shape: tuple[int, ...], itemsize: int = HALF) -> Shape:
        """An array of its own buffer."""
        return Shape(shape, itemsize, next(self._numbers))

    def empty(self, shape: tuple[int, ...], like: Shape) -> Shape:
        """See `protocol.Device`."""
        return self.array(shape, like.itemsize)

    def copy(self, source: Shape, target: Shape) -> None:
        """See `protocol.Device`."""
        self.verbs.append(
            Compute("copy", (source.buffer,), (target.buffer,), None, source.nbytes + target.nbytes)
        )

    def exchange(
        self, send: Sequence[Message[Shape]], receive: Sequence[Message[Shape]]
    ) -> Exchange:
        """See `protocol.Device`; arrival is what the simulation finds out."""
        self.verbs.append(exchange := Exchange(_parcels(send), _parcels(receive)))
        return exchange

    def wait(self, transfer: Exchange) -> None:
        """See `protocol.Device`."""
        self.verbs.append(Wait(tuple(parcel.buffer for parcel in transfer.receives)))

    def accumulator(
        self,
        q: Shape,
        v_head_dim: int,
        scale: float,
        softcap: float = 0.0,
        merged: Span = NO_ROWS,
    ) -> _Accumulator:
        """See `protocol.Device`."""
        rows, heads = q.shape[:2]
        return _Accumulator(
            q, self.array((rows, heads, v_head_dim)), self.array((rows, heads), SINGLE)
        )

    def attend(
        self, accumulator: _Accumulator, blocks: Sequence[Block], k: Shape, v: Shape
    ) -> None:
        """See `protocol.Device`."""
        for rows, keys, band in blocks if prod(k.shape) and accumulator.q.nbytes else ():
            _, heads, dim = accumulator.q.shape
            call = Call(len(rows), len(keys), heads, k.shape[1], dim, v.shape[2], band)
            accumulator.calls.append(rows)
            buffers = (accumulator.q.buffer, k.buffer, v.buffer)
            self.verbs.append(Compute("attend", buffers, (accumulator.output.buffer,), call))

    def finish(self, accumulator: _Accumulator, sinks: Shape | None = None) -> tuple[Shape, Shape]:
        """See `protocol.Device`: rows with one partial result need no merge."""
        output, lse = accumulator.output, accumulator.lse
        row = (output.nbytes + lse.nbytes) // max(1, output.shape[0])
        rows = sum(map(len, accumulator.calls))
        merged = rows + output.shape[0] if rows > output.shape[0] else 0
        writes = (output.buffer, lse.buffer)
        self.verbs.append(Compute("finish", (output.buffer,), writes, None, merged * row))
        return output, lse


@dataclass
class _Accumulator:
    q: Shape
    output: Shape
    lse: Shape
    calls: list[Span] = field(default_factory=list)


def _parcels(messages: Sequence[Message[Shape]]) -> tuple[Parcel, ...]:
    return tuple(
        Parcel(peer, array.buffer, array.nbytes) for array, peer in messages if array.nbytes
    )


def trace(plan: Plan, attend: Attend, items: int = 1) -> list[list[Verb]]:
    """Note what each rank does for a batch of `items` alike, the next always begun ahead."""
    owners, problem = partition_of(plan), plan.problem
    traces = []
    for rank in range(plan.ranks):
        device = Tracer(rank, plan.ranks)
        q_rows, kv_rows = token_count(owners.query[rank]), token_count(owners.kv[rank])

        def begin(device: Tracer = device, q_rows: int = q_rows, kv_rows: int = kv_rows) -> Any:
            steps = attend(
                device,
                plan,
                device.array((q_rows, problem.q_heads, problem.head_dim)),
                device.array((kv_rows, problem.kv_heads, problem.head_dim)),
                device.array((kv_rows, problem.kv_heads, problem.v_head_dim)),
            )
            next(steps)
            return steps

        following = begin()
        for item in range(items):
            current, following = following, begin() if item + 1 < items else None
            next(current, None)
        traces.append(device.verbs)
    return traces


def calls(traces: Sequence[Sequence[Verb]]) -> set[Call]:
    """Collect the attention calls whose times `simulate` needs."""
    return {
        verb.call for verbs in traces for verb in verbs if isinstance(verb, Compute) and verb.call
    }


def host_seconds(traces: Sequence[Sequence[Verb]], timings: Timings) -> float:
    """Add up what the slowest host needs to ask for everything; GPUs can't be faster for long.

    Where an item of several ranks is replayed, that is one launch.
    """
    asking = max(
        sum(_asking(verb, number, timings.host) for verb in verbs)
        for number, verbs in enumerate(traces)
    )
    return min(asking, timings.host.get("replay", asking)) if len(traces) > 1 else asking


def _asking(verb: Verb, rank: int, host: Mapping[str, float]) -> float:
    """Seconds that a host needs to ask for one verb; a wait is counted with its exchange."""
    if isinstance(verb, Wait):
        return 0.0
    if isinstance(verb, Compute):
        return host.get(verb.kind, 0.0)
    ends = ({parcel.peer for parcel in way} - {rank} for way in (verb.sends, verb.receives))
    kept = sum(parcel.peer == rank for parcel in verb.sends)
    return host.get("message", 0.0) * sum(map(len, ends)) / 2 + host.get("copy", 0.0) * kept


@dataclass
class _Rank:
    """Where one rank stands in virtual time; buffers are ready, or free, from a time on."""

    verbs: deque[Verb]
    clock: float = 0.0  # of the compute engine
    attends: bool = False  # the last thing it did was an attention call
    out: float = 0.0  # of the ports
    into: float = 0.0
    ready: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    free: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    coming: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # messages not yet
    going: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # timed, by buffer


class _Posted(NamedTuple):
    """A message at one of its ends: what may happen there from `time` on."""

    parcel: Parcel
    time: float


_Post = dict[tuple[int, int], tuple[deque[_Posted], deque[_Posted]]]  # by sender and receiver


def simulate(traces: Sequence[Sequence[Verb]], timings: Timings) -> float:
    """Play the notes of all ranks; return the seconds until the last rank has done its last verb.

    Raises
    ------
    ValueError
        Ranks wait for messages that nobody sends.

    """
    ranks = [_Rank(deque(verbs)) for verbs in traces]
    posted: _Post = defaultdict(lambda: (deque(), deque()))
    moved = True
    while moved:
        moved = False
        # One verb a rank and turn, so that messages pass the ports in the order of their posting.
        for number, rank in enumerate(ranks):
            if not rank.verbs or _blocked(rank, rank.verbs[0]):
                continue
            moved = True
            verb = rank.verbs.popleft()
            if isinstance(verb, Compute):
                _compute(rank, verb, timings)
            elif isinstance(verb, Wait):
                there = max((rank.ready[array] for array in verb.arrays), default=0.0)
                rank.ready.update(dict.fromkeys(verb.arrays, there))
            else:
                _post(number, rank, verb, posted)
        for (source, target), (sends, receives) in posted.items():
            while sends and receives:
                ends = ranks[source], ranks[target]
                _deliver(*ends, sends.popleft(), receives.popleft(), timings)
    if any(rank.verbs for rank in ranks):
        raise ValueError("ranks wait for messages that nobody sends")
    return max(max(rank.clock, rank.out, rank.into) for rank in ranks)


def _blocked(rank: _Rank, verb: Verb) -> bool:
    """Whether a verb needs an array that still comes or goes, at a time that isn't known yet."""
    if isinstance(verb, Compute | Wait):
        reads = verb.reads if isinstance(verb, Compute) else verb.arrays
        return any(rank.coming[buffer] for buffer in reads)
    return any(rank.coming[parcel.buffer] for parcel in verb.sends) or any(
        rank.going[parcel.buffer] for parcel in verb.receives
    )


def _post(number: int, rank: _Rank, exchange: Exchange, posted: _Post) -> None:
    for parcel in exchange.sends:
        rank.going[parcel.buffer] += 1
        posted[number, parcel.peer][0].append(_Posted(parcel, rank.ready[parcel.buffer]))
    for parcel in exchange.receives:
        rank.coming[parcel.buffer] += 1
        posted[parcel.peer, number][1].append(_Posted(parcel, rank.free[parcel.buffer]))


def _compute(rank: _Rank, verb: Compute, timings: Timings) -> None:
    start = max([rank.clock, *(rank.ready[buffer] for buffer in verb.reads)])
    if verb.call:
        busy = rank.attends and start == rank.clock
        alone = timings.attend[verb.call]
        seconds = timings.after.get(verb.call, alone) if busy else alone
    elif verb.kind == "copy":
        seconds = verb.nbytes / timings.memory
    else:
        seconds = timings.launch + verb.nbytes / timings.merge if verb.nbytes else 0.0
    rank.attends = verb.call is not None
    rank.clock = start + seconds
    for buffer in verb.reads:
        rank.free[buffer] = max(rank.free[buffer], rank.clock)
    for buffer in verb.writes:
        rank.ready[buffer] = rank.clock


def _deliver(source: _Rank, target: _Rank, sent: _Posted, place: _Posted, timings: Timings) -> None:
    """Move a message once it is there and its place is free.

    It passes both ports, each of which takes what comes in turn; one doesn't hold up the other.
    """
    start = max(sent.time, place.time)
    nbytes, gone, got = sent.parcel.nbytes, sent.parcel.buffer, place.parcel.buffer
    if source is target:
        end = start + nbytes / (timings.memory / 2)
    else:
        source.out = max(source.out, start) + nbytes / timings.bandwidth
        target.into = max(target.into, start) + nbytes / timings.bandwidth
        end = max(source.out, target.into) + timings.latency
    source.free[gone] = max(source.free[gone], end)
    target.ready[got] = max(target.ready[got], end)
    source.going[gone] -= 1
    target.coming[got] -= 1
