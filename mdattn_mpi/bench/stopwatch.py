"""Measuring what ``bench predict`` plays with: kernels, links, memory, and the host's part.

A GPU's clocks fall under load, so a long call is timed as ``bench attention`` times it: after a
pause, among others like it, the first of them left out. Of a short one, that would only show how
fast the host can ask for it: so it is asked for while the GPU is still busy with something longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.attention_cuda import SECONDS, pause
from mdattn_mpi.devices.protocol import run_to_end

if TYPE_CHECKING:
    from mdattn_mpi.bench.timeline import Call, Timings
    from mdattn_mpi.devices.cuda.device import CudaDevice
    from mdattn_mpi.lockstep import World

LINK_BYTES = 1 << 26
SMALL_BYTES = 1 << 12
ROUNDS = 3
CALLS = 20  # short ones that are timed together
SHORT, LONG = 5e-4, 1e-2  # seconds
LEAD = 8192  # tokens of the attention that keeps a GPU busy meanwhile
MERGED = (2048, 16384)  # rows of two merges, to tell launch and bytes apart
HEADS, DIM = 8, 128


def measure(world: World, known: Timings, missing: Sequence[Call]) -> Timings:
    """Collective. Time the calls that are missing, on all ranks at once; the slowest rank counts.

    The device itself is measured unless it is known, and so are its links where there are any.
    """
    from mdattn_mpi.devices.cuda.open import open_cuda

    device = open_cuda(world)
    watch = Stopwatch(device)
    timings = known
    if not timings.memory:
        timings = _with_device(world, watch, timings)
    if world.size > 1 and not timings.latency:
        timings = _with_links(world, watch, timings)
    alone, after = _attending(world, watch, missing, timings)
    device.close()
    return replace(
        timings,
        bandwidth=timings.bandwidth or float("inf"),
        attend={**timings.attend, **alone},
        after={**timings.after, **after},
    )


def _with_device(world: World, watch: Stopwatch, timings: Timings) -> Timings:
    """Collective. Measure copies and merges, and what the host needs to ask for everything."""
    world.barrier()
    memory = 2 * LINK_BYTES / watch.seconds_among(copying(watch.device))
    merge, launch = _merging(watch)
    host = _slowest(world, _asking(watch))
    return replace(timings, memory=memory, merge=merge, launch=launch, host=host)


def _with_links(world: World, watch: Stopwatch, timings: Timings) -> Timings:
    """Collective. Measure messages from rank to rank."""
    world.barrier()
    small = exchanging(watch.device, SMALL_BYTES)
    latency = watch.seconds_among(small)
    large = watch.seconds_among(exchanging(watch.device, LINK_BYTES))
    bandwidth = LINK_BYTES / max(large - latency, 1e-9)
    message = max(watch.asking_seconds(small) - timings.host.get("copy", 0.0), 0.0)
    replay = watch.asking_seconds(replaying(watch.device))
    host = {**timings.host, **_slowest(world, {"message": message, "replay": replay})}
    return replace(timings, bandwidth=bandwidth, latency=latency, host=host)


class Stopwatch:
    """Times calls that end in an array, on a GPU: asking for them isn't doing them."""

    def __init__(self, device: CudaDevice) -> None:
        self.device = device
        self._lead = attention(device, _call(LEAD, LEAD))
        self._burst(self._lead, 1)
        self._lead_seconds = self._burst(self._lead, 4) / 4

    def seconds(self, once: Callable[[], Any]) -> float:
        """How long a call takes, among as many as fill a turn."""
        self._burst(once, 1)
        guess = self._burst(once, 1)
        return self.seconds_among(once) if guess < SHORT else self._turn(once, guess)

    def seconds_among(self, once: Callable[[], Any]) -> float:
        """How long a short call takes; the same number of calls on every rank."""
        self._burst(once, 1)
        leads = self._leads(once)
        return max(
            median(
                self._burst(once, 2 * CALLS, leads) - self._burst(once, CALLS, leads)
                for _ in range(ROUNDS)
            )
            / CALLS,
            1e-9,
        )

    def burst_behind_leads(self, once: Callable[[], Any]) -> None:
        """Do some calls that the host has asked for before the GPU comes to them."""
        self._burst(once, CALLS, self._leads(once))

    def asking_seconds(self, once: Callable[[], Any]) -> float:
        """How long the host needs for a call whose work is nothing."""
        self._burst(once, CALLS)
        return median(
            self._burst(once, 3 * CALLS) - self._burst(once, CALLS) for _ in range(ROUNDS)
        ) / (2 * CALLS)

    def _turn(self, once: Callable[[], Any], guess: float) -> float:
        """Time calls that come after half a turn of them."""
        calls, taken = ceil(SECONDS / 2 / guess), []
        for thirds in (1, 3):
            pause()
            taken.append(self._burst(once, thirds * calls))
        return (taken[1] - taken[0]) / (2 * calls)

    def _leads(self, once: Callable[[], Any]) -> int:
        """How many leads keep the GPU busy until the host has asked for everything."""
        start = perf_counter()
        for _ in range(2 * CALLS):
            last = once()
        asked = perf_counter() - start
        self.device.download(last).wait()
        return ceil(1.5 * asked / self._lead_seconds)

    def _burst(self, once: Callable[[], Any], calls: int, leads: int = 0) -> float:
        start = perf_counter()
        for _ in range(leads):
            self._lead()
        for _ in range(calls):
            last = once()
        self.device.download(last).wait()
        return perf_counter() - start


def attention(device: CudaDevice, call: Call, times: int = 1) -> Callable[[], Any]:
    """Attend `times` with all rows to random data, and finish."""
    from mdattn_mpi.mask import Span
    from mdattn_mpi.partition import Block

    q = _random(device, (call.q_rows, call.q_heads, call.head_dim))
    k = _random(device, (call.kv_rows, call.kv_heads, call.head_dim))
    v = _random(device, (call.kv_rows, call.kv_heads, call.v_head_dim))

    block = Block(Span(0, call.q_rows), Span(0, call.kv_rows), call.band)

    def once() -> Any:
        accumulator = device.accumulator(q, call.v_head_dim, call.head_dim**-0.5)
        for _ in range(times):
            device.attend(accumulator, [block], k, v)
        return device.finish(accumulator)[1]

    return once


def copying(device: CudaDevice, nbytes: int = LINK_BYTES) -> Callable[[], Any]:
    """Copy inside the device."""
    source = _random(device, (nbytes // 2, 1, 1))
    target = device.empty(source.shape, source)

    def once() -> Any:
        device.copy(source, target)
        return target[:1]

    return once


def exchanging(device: CudaDevice, nbytes: int) -> Callable[[], Any]:
    """Send a message to the next rank while one comes from the rank before; look at it."""
    there = _random(device, (nbytes // 2, 1, 1))
    here, seen = device.empty(there.shape, there), device.empty((1, 1, 1), there)
    after, before = (device.rank + 1) % device.ranks, (device.rank - 1) % device.ranks

    def once() -> Any:
        device.wait(device.exchange([(there, after)], [(here, before)]))
        device.copy(here[:1], seen)  # the next message can't come before this
        return seen

    return once


def replaying(device: CudaDevice) -> Callable[[], Any]:
    """Attend to next to nothing, in a group: recorded by the first calls, then replayed."""
    from mdattn_mpi.problem import AttentionProblem, Plan
    from mdattn_mpi.strategies import STRATEGIES

    problem = AttentionProblem(64 * device.ranks, 64 * device.ranks, HEADS, HEADS, DIM, DIM)
    plan = Plan(problem, "ring", device.ranks)
    shards = [_random(device, (64, HEADS, DIM)) for _ in range(3)]

    def once() -> Any:
        steps = device.perform(STRATEGIES["ring"], plan, *shards)
        next(steps)
        return run_to_end(steps)[1]

    return once


def _attending(
    world: World, watch: Stopwatch, missing: Sequence[Call], timings: Timings
) -> tuple[dict[Call, float], dict[Call, float]]:
    """Collective. Seconds of every call alone, and after another one like it."""
    alone, after = [], []
    for call in missing:
        world.barrier()
        alone.append(watch.seconds(attention(watch.device, call)))
        after.append(alone[-1])
        if alone[-1] < LONG:
            merged = timings.launch + 3 * call.q_rows * _row(call) / timings.merge
            pair = watch.seconds(attention(watch.device, call, 2)) - merged
            after[-1] = min(alone[-1], max(pair - alone[-1], 0.0))
    everyone = zip(*world.allgather([alone, after]), strict=True)
    alone, after = ([max(each) for each in zip(*ranks, strict=True)] for ranks in everyone)
    return dict(zip(missing, alone, strict=True)), dict(zip(missing, after, strict=True))


def _merging(watch: Stopwatch) -> tuple[float, float]:
    """Bytes/s of a merge, and the seconds that it takes besides: by the GPU's own clock."""
    taken = []
    for rows in MERGED:
        twice = attention(watch.device, _call(rows, MERGED[0]), 2)
        watch.seconds_among(twice)  # by then everything is compiled
        before = watch.device.seconds["merge"]
        watch.burst_behind_leads(twice)
        taken.append((watch.device.seconds["merge"] - before) / CALLS)
    row = 3 * _row(_call(1, 1))
    rate = (MERGED[1] - MERGED[0]) * row / max(taken[1] - taken[0], 1e-9)
    return rate, max(taken[0] - MERGED[0] * row / rate, 0.0)


def _row(call: Call) -> int:
    """Bytes of a row of output and LSE."""
    return call.q_heads * (2 * call.v_head_dim + 4)


def _asking(watch: Stopwatch) -> dict[str, float]:
    """Seconds of the host for every verb but messages, from calls whose work is nothing."""
    small = _call(64, 64)
    one, two = (watch.asking_seconds(attention(watch.device, small, times)) for times in (1, 2))
    return {
        "attend": max(two - one, 0.0),
        "finish": max(2 * one - two, 0.0),
        "copy": watch.asking_seconds(copying(watch.device, SMALL_BYTES)),
    }


def _slowest(world: World, own: dict[str, float]) -> dict[str, float]:
    """Collective. The greatest of every figure."""
    ranks = world.allgather(own)
    return {name: max(each[name] for each in ranks) for name in own}


def _call(rows: int, keys: int) -> Call:
    from mdattn_mpi.bench.timeline import Call

    return Call(rows, keys, HEADS, HEADS, DIM, DIM)


def _random(device: CudaDevice, shape: tuple[int, ...]) -> Any:
    import ml_dtypes
    import numpy as np

    # The same million numbers again and again: drawing them all would take longer than measuring.
    some = np.random.default_rng().standard_normal(1 << 20, np.float32)
    return device.upload(np.resize(some.astype(ml_dtypes.bfloat16), shape))
