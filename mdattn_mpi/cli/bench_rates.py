"""Measuring what ``bench predict`` plays with: kernels, links, memory, and the host's part.

A GPU's clocks fall under load, so a long call is timed as ``bench attention`` times it: after a
pause, among others like it, the first of them left out. Of a short one, that would only show how
fast the host can ask for it: so it is asked for while the GPU is still busy with something longer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from math import ceil
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mdattn_mpi.cli.bench_attention_cuda import SECONDS, pause

if TYPE_CHECKING:
    from mdattn_mpi.devices.timeline import Call, Rates
    from mdattn_mpi.lockstep import World

LINK_BYTES = 1 << 26
SMALL_BYTES = 1 << 12
ROUNDS = 3
CALLS = 20  # short ones that are timed together
SHORT, LONG = 5e-4, 1e-2  # seconds
LEAD = 8192  # tokens of the attention that keeps a GPU busy meanwhile
MERGED = (2048, 16384)  # rows of two merges, to tell launch and bytes apart
HEADS, DIM = 8, 128


def measure(
    world: World, arguments: argparse.Namespace, known: Rates, missing: Sequence[Call]
) -> Rates:
    """Collective. Time the calls that are missing, on all ranks at once; the slowest rank counts.

    Links are measured where there are any.
    """
    from mdattn_mpi.backends import open_backend
    from mdattn_mpi.devices.timeline import Rates

    backend = open_backend(arguments.backend, world, threads=arguments.threads)
    device = backend.device  # type: ignore[attr-defined]
    watch = Stopwatch(device, runs_ahead=arguments.backend == "cuda")
    merge, launch = _merging(device) if watch.runs_ahead else (known.merge, known.launch)

    def merging(call: Call) -> float:
        return launch + 3 * call.q_rows * _row(call) / merge

    alone, after = _attending(world, watch, missing, merging)
    alone, after = {**known.attend, **alone}, {**known.after, **after}
    world.barrier()
    memory = 2 * LINK_BYTES / watch.seconds_among(copying(device))
    merge, host = merge or memory, dict(known.host)
    bandwidth, latency = known.bandwidth or float("inf"), known.latency
    if world.size > 1:
        large = watch.seconds_among(exchanging(device, LINK_BYTES))
        latency = watch.seconds_among(exchanging(device, SMALL_BYTES))
        bandwidth = LINK_BYTES / max(large - latency, 1e-9)
    if watch.runs_ahead:
        host |= _asking(world, watch, device)
    backend.close()
    return Rates(alone, bandwidth, latency, memory, merge, launch, host, after)


class Stopwatch:
    """Times calls that end in an array; `runs_ahead` says that asking isn't doing."""

    def __init__(self, device: Any, *, runs_ahead: bool) -> None:
        self.device = device
        self.runs_ahead = runs_ahead
        if runs_ahead:
            self._lead = attention(device, _call(LEAD, LEAD))
            self._burst(self._lead, 1)
            self._lead_seconds = self._burst(self._lead, 4) / 4

    def seconds(self, once: Callable[[], Any]) -> float:
        """How long a call takes, among as many as fill a turn."""
        self._burst(once, 1)
        guess = self._burst(once, 1)
        if self.runs_ahead and guess < SHORT:
            return self.seconds_among(once)
        return self._turn(once, guess)

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
            if self.runs_ahead:
                pause()
            taken.append(self._burst(once, thirds * calls))
        return (taken[1] - taken[0]) / (2 * calls)

    def _leads(self, once: Callable[[], Any]) -> int:
        """How many leads keep the GPU busy until the host has asked for everything."""
        if not self.runs_ahead:
            return 0
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


def attention(device: Any, call: Call, times: int = 1) -> Callable[[], Any]:
    """Attend `times` with all rows to random data, and finish."""
    from mdattn_mpi.problem import Span

    q = _random(device, (call.q_rows, call.q_heads, call.head_dim))
    k = _random(device, (call.kv_rows, call.kv_heads, call.head_dim))
    v = _random(device, (call.kv_rows, call.kv_heads, call.v_head_dim))

    def once() -> Any:
        accumulator = device.accumulator(q, call.v_head_dim, call.head_dim**-0.5)
        for _ in range(times):
            device.attend(accumulator, Span(0, call.q_rows), k, v, call.causal)
        return device.finish(accumulator)[1]

    return once


def copying(device: Any, nbytes: int = LINK_BYTES) -> Callable[[], Any]:
    """Copy inside the device."""
    source = _random(device, (nbytes // 2, 1, 1))
    target = device.empty(source.shape, source)

    def once() -> Any:
        device.copy(source, target)
        return target[:1]

    return once


def exchanging(device: Any, nbytes: int) -> Callable[[], Any]:
    """Send a message to the next rank while one comes from the rank before; look at it."""
    from mdattn_mpi.devices.protocol import Message

    there = _random(device, (nbytes // 2, 1, 1))
    here, seen = device.empty(there.shape, there), device.empty((1, 1, 1), there)
    after, before = (device.rank + 1) % device.ranks, (device.rank - 1) % device.ranks

    def once() -> Any:
        device.wait(device.exchange([Message(there, after)], [Message(here, before)]))
        device.copy(here[:1], seen)  # the next message can't come before this
        return seen

    return once


def _attending(
    world: World, watch: Stopwatch, missing: Sequence[Call], merging: Callable[[Call], float]
) -> tuple[dict[Call, float], dict[Call, float]]:
    """Collective. Seconds of every call alone, and after another one like it."""
    alone, after = [], []
    for call in missing:
        world.barrier()
        alone.append(watch.seconds(attention(watch.device, call)))
        after.append(alone[-1])
        if watch.runs_ahead and alone[-1] < LONG:
            pair = watch.seconds(attention(watch.device, call, 2)) - merging(call)
            after[-1] = min(alone[-1], max(pair - alone[-1], 0.0))
    everyone = zip(*_everyone(world, [alone, after]), strict=True)
    alone, after = ([max(each) for each in zip(*ranks, strict=True)] for ranks in everyone)
    return dict(zip(missing, alone, strict=True)), dict(zip(missing, after, strict=True))


def _merging(device: Any) -> tuple[float, float]:
    """Bytes/s of a merge, and the seconds that it takes besides: by the GPU's own clock."""
    taken = []
    for rows in MERGED:
        call = _call(rows, MERGED[0])
        twice = attention(device, call, 2)
        for calls in (1, CALLS):
            before = device.seconds["merge"]
            for _ in range(calls):
                last = twice()
            device.download(last).wait()
        taken.append((device.seconds["merge"] - before) / CALLS)
    row = 3 * _row(call)
    rate = (MERGED[1] - MERGED[0]) * row / max(taken[1] - taken[0], 1e-9)
    return rate, max(taken[0] - MERGED[0] * row / rate, 0.0)


def _row(call: Call) -> int:
    """Bytes of a row of output and LSE."""
    return call.q_heads * (2 * call.v_head_dim + 4)


def _asking(world: World, watch: Stopwatch, device: Any) -> dict[str, float]:
    """Collective. Seconds of the host for every verb, from calls whose work is nothing."""
    small = _call(64, 64)
    one, two = (watch.asking_seconds(attention(device, small, times)) for times in (1, 2))
    found = {
        "attend": max(two - one, 0.0),
        "finish": max(2 * one - two, 0.0),
        "copy": watch.asking_seconds(copying(device, SMALL_BYTES)),
    }
    if world.size > 1:
        message = watch.asking_seconds(exchanging(device, SMALL_BYTES)) - found["copy"]
        found["message"] = max(message, 0.0)
    return {name: max(each[name] for each in _everyone(world, found)) for name in found}


def _call(rows: int, keys: int) -> Call:
    from mdattn_mpi.devices.timeline import Call

    return Call(rows, keys, HEADS, HEADS, DIM, DIM, causal=False)


def _everyone(world: World, own: Any) -> list[Any]:
    """Collective. What every rank has found."""
    gathered = world.gather_bytes(json.dumps(own).encode())
    whole = json.dumps(list(map(json.loads, gathered))).encode() if gathered else b""
    found: list[Any] = json.loads(world.bcast_bytes(whole))
    return found


def _random(device: Any, shape: tuple[int, ...]) -> Any:
    import ml_dtypes
    import numpy as np

    # The same million numbers again and again: drawing them all would take longer than measuring.
    some = np.random.default_rng().standard_normal(1 << 20, np.float32)
    return device.upload(np.resize(some.astype(ml_dtypes.bfloat16), shape))
