"""Timing a device that its host runs ahead of, in virtual time."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from mdattn_mpi.bench import stopwatch
from mdattn_mpi.bench.stopwatch import Stopwatch, attention, copying
from mdattn_mpi.bench.timeline import Call

ASKING = 1e-4  # seconds of the host for a call of any kind
PAIR = 1e-12  # seconds of the GPU for a query and a key, over all heads and dims
BYTE = 1e-12
SLOW = 1.25  # how much slower a GPU is once it is warm
WARM = 0.05  # seconds of work after which it is


class Late:
    """A device whose work begins when the host has asked and what came before is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.busy_until = self.worked = 0.0
        monkeypatch.setattr(stopwatch, "perf_counter", lambda: self.now)
        monkeypatch.setattr(stopwatch, "pause", self.cool_down)
        monkeypatch.setattr(stopwatch, "_random", lambda device, shape: Array(shape))

    def cool_down(self) -> None:
        self.now, self.worked = self.now + 0.2, 0.0

    def work(self, seconds: float) -> None:
        self.now += ASKING
        seconds *= SLOW if self.worked > WARM else 1.0
        self.worked += seconds
        self.busy_until = max(self.busy_until, self.now) + seconds

    def accumulator(self, q: Array, v_head_dim: int, scale: float, **merged: Any) -> Array:
        return q

    def attend(self, accumulator: Array, blocks: Any, k: Array, v: Array) -> None:
        self.work(accumulator.shape[0] * k.shape[0] * PAIR * prod(k.shape[1:]))

    def finish(self, accumulator: Array, sinks: Any = None) -> tuple[Array, Array]:
        return accumulator, accumulator

    def empty(self, shape: tuple[int, ...], like: Array) -> Array:
        return Array(shape)

    def copy(self, source: Array, target: Array) -> None:
        self.work(2 * prod(source.shape) * BYTE)

    def download(self, *arrays: Array) -> Late:
        return self

    def wait(self) -> None:
        self.now = max(self.now, self.busy_until)


class Array:
    """A shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, index: slice) -> Array:
        return Array((len(range(*index.indices(self.shape[0]))), *self.shape[1:]))


def call(tokens: int) -> Call:
    return Call(tokens, tokens, 1, 1, 8, 8)


def test_a_short_call_is_timed_while_the_device_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Late(monkeypatch)
    watch = Stopwatch(device)
    work = 8 * 1000**2 * PAIR  # 8 us: a twelfth of what asking takes
    assert watch.seconds(attention(device, call(1000))) == pytest.approx(SLOW * work, rel=1e-3)
    nbytes = 1 << 20
    assert watch.seconds_among(copying(device, nbytes)) == pytest.approx(SLOW * nbytes * BYTE)


def test_a_long_call_is_timed_when_the_clocks_have_fallen(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Late(monkeypatch)
    watch = Stopwatch(device)
    work = 8 * 40_000**2 * PAIR  # 13 ms
    found = watch.seconds(attention(device, call(40_000)))
    assert found == pytest.approx(SLOW * work, rel=0.02)


def test_what_the_host_takes_is_timed_where_the_device_has_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Late(monkeypatch)
    watch = Stopwatch(device)
    assert watch.asking_seconds(attention(device, call(8))) == pytest.approx(ASKING, rel=1e-3)
    assert watch.asking_seconds(attention(device, call(8), 2)) == pytest.approx(
        2 * ASKING, rel=0.01
    )
