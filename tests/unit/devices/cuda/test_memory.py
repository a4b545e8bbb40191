"""Device memory: no byte has two owners, and what was given back can be taken again."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.devices.cuda import memory
from mdattn_mpi.devices.cuda.memory import (
    ALIGNMENT,
    BLOCK,
    Allocation,
    BlockRange,
    DeviceArray,
    HostBuffers,
    Memory,
    size_class,
)
from mdattn_mpi.errors import DeviceError
from tests.support.fake_gpu import DTYPES, FakeGpu, Machine


class Driver:
    """Addresses without memory behind them."""

    def __init__(self, capacity: int = 1 << 40) -> None:
        self.left = capacity
        self.taken: dict[int, int] = {}

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.left:
            return 0
        self.left -= nbytes
        address = (len(self.taken) + 1) << 41
        self.taken[address] = nbytes
        return address

    def available(self) -> int:
        return self.left

    def release(self, address: int) -> None:
        self.left += self.taken[address]


class Stage:
    """A queue, as a fence knows it."""

    def __init__(self, *, leaves: bool = False) -> None:
        self.leaves, self.past = leaves, False

    def is_past(self, count: int) -> bool:
        return self.past


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5000), st.integers(0, 99)), max_size=80))
def test_no_byte_has_two_owners(steps: list[tuple[bool, int, int]]) -> None:
    memory, owned = Memory(Driver()), list[BlockRange]()
    for take, size, which in steps:
        if take or not owned:
            piece, _ = memory.cut(size)
            assert piece.stop - piece.start >= size
            assert piece.start % ALIGNMENT == 0
            owned.append(piece)
        else:
            memory.give_back(owned.pop(which % len(owned)), {})
        for before, after in pairwise(sorted(owned, key=lambda p: (p.block, p.start))):
            assert before.block < after.block or before.stop <= after.start
        assert memory.in_use == sum(piece.stop - piece.start for piece in owned)


def test_pieces_that_were_given_back_join_before_more_is_asked_for() -> None:
    driver = Driver()
    memory = Memory(driver)
    for size in (BLOCK // 8, BLOCK // 4, BLOCK // 2):
        for piece in [memory.cut(size)[0] for _ in range(BLOCK // size)]:
            memory.give_back(piece, {})
    memory.cut(BLOCK)
    assert len(driver.taken) == 1


def test_the_piece_that_has_been_idle_longest_goes_first() -> None:
    memory = Memory(Driver())
    pieces = [memory.cut(1000)[0] for _ in range(3)]
    for piece in (pieces[1], pieces[2], pieces[0]):
        memory.give_back(piece, {})
    assert [memory.cut(1000)[0] for _ in range(3)] == [pieces[1], pieces[2], pieces[0]]


def test_what_is_on_its_way_to_the_host_is_taken_only_where_there_is_no_more() -> None:
    """Else an item waits for the output before it to leave; seen on two GPUs, 2 ms an item."""
    driver = Driver(capacity=2 * BLOCK)
    memory, download, kernels = Memory(driver), Stage(leaves=True), Stage()
    pieces = [memory.cut(BLOCK // 2)[0] for _ in range(2)]
    memory.give_back(pieces[0], {download: 1})
    memory.give_back(pieces[1], {kernels: 1})
    assert memory.cut(BLOCK // 2) == (pieces[1], {kernels: 1})
    for _ in range(2):  # nothing waits: the driver gives another block
        assert memory.cut(BLOCK // 2)[0].block == 1
    assert memory.cut(BLOCK // 2) == (pieces[0], {download: 1})
    memory.give_back(pieces[0], {download: 1})
    download.past = True
    assert memory.cut(BLOCK // 3)[0].block == 0


def test_a_slightly_smaller_array_takes_a_piece_as_it_is() -> None:
    """Joined pieces have the fences of all: an item would wait for the download before it."""
    memory = Memory(Driver())
    pieces, stages = [memory.cut(size)[0] for size in (100_000, 100_000, 90_000)], [Stage()] * 3
    for number, piece in enumerate(pieces):
        memory.give_back(piece, {stages[number]: number})
    assert [memory.cut(85_000)[1] for _ in range(3)] == [{stages[n]: n} for n in range(3)]
    assert memory.in_use == sum(piece.stop - piece.start for piece in pieces)
    for piece in pieces:
        memory.give_back(piece, {})
    assert memory.cut(50_000)[0] not in pieces  # not in one of twice the size


def test_a_piece_brings_its_fence_along() -> None:
    memory = Memory(Driver())
    piece, fence = memory.cut(1000)
    assert fence == {}
    fence = {Stage(): 1}
    memory.give_back(piece, fence)
    assert memory.cut(1000) == (piece, fence)


def test_no_memory_is_said_with_figures() -> None:
    memory = Memory(Driver(capacity=BLOCK))
    memory.cut(BLOCK // 2)
    with pytest.raises(DeviceError, match=r"1 GiB more were needed, 0 GiB are free, 0\.125 GiB"):
        memory.cut(1 << 30)
    assert memory.in_use == memory.peak == BLOCK // 2


def test_pinned_memory_of_a_larger_array_serves_a_smaller_one() -> None:
    taken: list[int] = []

    class Pinning(FakeGpu):
        def pinned(self, nbytes: int) -> int:
            taken.append(nbytes)
            return super().pinned(nbytes)

    buffers = HostBuffers(Pinning(Machine(1)))
    for tokens in (60000, 41000, 7000, 60000):  # as a job of mixed lengths has them
        kept = [buffers.empty((tokens, 64), DTYPES["float16"]) for _ in range(2)]
        addresses = {array.ctypes.data for array in kept}
        assert len(addresses) == 2
        del kept
    assert taken == [size_class(60000 * 128)] * 2
    large = buffers.empty((60000, 64), DTYPES["float16"])
    tiny = buffers.empty((60,), DTYPES["float32"])  # not in memory that is 30,000 times as large
    assert taken[2:] == [size_class(240)]
    large[...], tiny[...] = 1, 2
    assert (large == 1).all()


def test_a_view_of_everything_is_the_array_itself() -> None:
    array = DeviceArray(Allocation(1 << 20), (6, 2, 8), DTYPES["bfloat16"])
    assert array[0:6] is array
    part = array[2:5]
    assert (part.address, part.shape) == (array.address + 2 * 2 * 8 * 2, (3, 2, 8))
    heads = part[:, 1:2]
    assert (heads.address, heads.shape) == (part.address + 8 * 2, (3, 1, 8))
    assert heads.strides == array.strides == (16, 8, 1)
    assert array.is_contiguous
    assert part.is_contiguous
    assert not heads.is_contiguous
    assert array[0:6].nbytes == 6 * 2 * 8 * 2


def test_contiguity_is_that_of_extents_and_strides() -> None:
    one_run = memory.is_one_run
    assert one_run((3, 4), (4, 1))
    assert one_run((1, 4), (99, 1))
    assert not one_run((3, 4), (5, 1))
