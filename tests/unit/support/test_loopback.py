"""The loopback device catches what a real device would leave undefined, and never hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.mask import FULL, LOWER_RIGHT, Span
from mdattn_mpi.partition import Block
from tests.support.loopback import ProtocolError, run_ranks

ONE = np.ones((3, 2, 4), np.float16)


def swap(device: Any, between: Callable[[Any, Any, Any], None] = lambda *_: None) -> Any:
    """Exchange an array with the next rank, with something done before `wait`."""
    sent, received = ONE * device.rank, np.empty_like(ONE)
    right, left = (device.rank + 1) % device.ranks, (device.rank - 1) % device.ranks
    transfer = device.exchange([(sent, right)], [(received, left)])
    between(device, sent, received)
    device.wait(transfer)
    return received[0, 0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 16])
def test_messages_go_round(ranks: int) -> None:
    assert run_ranks(ranks, swap) == [(rank - 1) % ranks for rank in range(ranks)]


def test_messages_between_two_ranks_keep_their_order_and_empty_ones_are_skipped() -> None:
    def run(device: Any) -> list[float]:
        other = 1 - device.rank
        arrays = [ONE * n for n in range(5)]
        received = [np.empty_like(ONE) for _ in range(5)]
        empty = ONE[:0]
        transfer = device.exchange(
            [(empty, other), *((array, other) for array in arrays)],
            [*((array, other) for array in received), (empty, device.rank)],
        )
        device.wait(transfer)
        return [float(array[0, 0, 0]) for array in received]

    assert run_ranks(2, run) == [[0, 1, 2, 3, 4]] * 2


def test_transfers_may_be_waited_for_in_another_order() -> None:
    def run(device: Any) -> list[float]:
        other, received = 1 - device.rank, [np.empty_like(ONE) for _ in range(3)]
        transfers = [
            device.exchange([(ONE * n, other)], [(array, other)])
            for n, array in enumerate(received)
        ]
        for transfer in transfers[::-1] if device.rank else transfers:
            device.wait(transfer)
        return [float(array[0, 0, 0]) for array in received]

    assert run_ranks(2, run) == [[0, 1, 2]] * 2


def poke_sent(device: Any, sent: Any, received: Any) -> None:
    sent[1] += 1


def poke_received(device: Any, sent: Any, received: Any) -> None:
    received[...] = 0


def copy_received(device: Any, sent: Any, received: Any) -> None:
    device.copy(received, np.empty_like(received))


def copy_into_sent(device: Any, sent: Any, received: Any) -> None:
    device.copy(ONE, sent)


def attend_received(device: Any, sent: Any, received: Any) -> None:
    accumulator = device.accumulator(ONE, 4, 1.0)
    device.attend(accumulator, [Block(Span(0, 3), Span(0, 3), FULL)], received, ONE)


def receive_into_sent(device: Any, sent: Any, received: Any) -> None:
    device.exchange([], [(sent[:1], device.rank)])


def send_received(device: Any, sent: Any, received: Any) -> None:
    device.exchange([(received, device.rank)], [])


@pytest.mark.parametrize(
    "between",
    [
        poke_sent,
        poke_received,
        copy_received,
        copy_into_sent,
        attend_received,
        receive_into_sent,
        send_received,
    ],
)
def test_touching_before_wait_is_caught(between: Any) -> None:
    with pytest.raises(ProtocolError, match="before wait"):
        run_ranks(2, lambda device: swap(device, between))


def test_what_is_received_is_nan_until_wait() -> None:
    def look(device: Any, sent: Any, received: Any) -> None:
        assert np.isnan(received).all()

    run_ranks(2, lambda device: swap(device, look))


def forget(device: Any) -> None:
    other = 1 - device.rank
    device.exchange([(ONE, other)], [(np.empty_like(ONE), other)])


def twice(device: Any) -> None:
    transfer = device.exchange([], [])
    device.wait(transfer)
    device.wait(transfer)


def unequally(device: Any) -> None:
    for _ in range(device.rank):
        device.wait(device.exchange([], []))


def of_another_shape(device: Any) -> None:
    received = np.empty((3, 2, 4 - device.rank), np.float16)
    transfer = device.exchange([(ONE, 1 - device.rank)], [(received, 1 - device.rank)])
    device.wait(transfer)


def not_contiguous(device: Any) -> None:
    device.exchange([(ONE[:, :1], 1 - device.rank)], [])


def fewer_keys_than_rows(device: Any) -> None:
    accumulator = device.accumulator(ONE, 4, 1.0)
    device.attend(accumulator, [Block(Span(0, 3), Span(0, 2), LOWER_RIGHT)], ONE[:2], ONE[:2])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (forget, "never waited for"),
        (twice, "isn't under way"),
        (unequally, "unequally often"),
        (of_another_shape, "sent .* expected"),
        (not_contiguous, "contiguous"),
        (fewer_keys_than_rows, "fewer keys than rows"),
    ],
)
def test_what_the_protocol_forbids_is_caught(function: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        run_ranks(2, function)


def test_a_message_that_nobody_sends_ends_at_the_deadline() -> None:
    def run(device: Any) -> None:
        transfer = device.exchange([], [(np.empty_like(ONE), 1 - device.rank)])
        device.wait(transfer)

    with pytest.raises(ProtocolError, match="nothing within"):
        run_ranks(2, run, deadline=0.2)


def test_a_message_that_nobody_expects_ends_at_the_deadline() -> None:
    def run(device: Any) -> None:
        device.wait(device.exchange([(ONE, 1 - device.rank)], []))

    with pytest.raises(ProtocolError, match="expected nothing from"):
        run_ranks(2, run, deadline=0.2)


def test_the_first_error_is_raised_and_nobody_waits_for_the_rank_that_failed() -> None:
    def run(device: Any) -> None:
        if device.rank == 1:
            raise ZeroDivisionError("rank 1")
        swap(device)

    with pytest.raises(ZeroDivisionError, match="rank 1"):
        run_ranks(4, run, deadline=100)


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    run_ranks(8, swap)
    assert threading.active_count() == before
