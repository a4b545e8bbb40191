"""Outputs of a step, which lie at few addresses: they are used again once nobody has them."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from functools import partial

from mdattn_mpi.devices.cuda.memory import Allocation, BlockRange, DeviceArray, Memory
from mdattn_mpi.devices.cuda.order import Fence

MOST = 4  # sets that are kept

Arrays = tuple[DeviceArray, ...]


class Loans:
    """Sets of arrays that are lent together; one is free when all its arrays are garbage.

    What is lent keeps the memory, however long, and whoever else has gone by then.

    Parameters
    ----------
    memory
        Where they lie.
    like
        Has shapes and dtypes of one set.

    """

    def __init__(self, memory: Memory, like: Sequence[DeviceArray]) -> None:
        self._memory, self._like = memory, tuple(like)
        self._sets: list[Arrays] = []
        self._lent: list[int] = []  # of each set, how many arrays are out
        self._returned: deque[tuple[int, int, Fence]] = deque()

    def take(self, known: Container[tuple[int, ...]]) -> Arrays:
        """Lend a free set, if possible one whose addresses are `known`; else make one."""
        self._take_back()
        free = [number for number, lent in enumerate(self._lent) if not lent]
        wanted = next((n for n in free if _addresses(self._sets[n]) in known), None)
        number = wanted if wanted is not None else next(iter(free), None)
        if number is None:
            made = tuple(self._memory.empty(each.shape, each.dtype) for each in self._like)
            if len(self._sets) == MOST:
                return made
            number = len(self._sets)
            self._sets.append(made)
            self._lent.append(0)
        self._lent[number] = len(self._like)
        return tuple(
            self._lend(array, number, place) for place, array in enumerate(self._sets[number])
        )

    def _lend(self, array: DeviceArray, number: int, place: int) -> DeviceArray:
        own = array.allocation
        give_back = partial(self._give_back, number, place)
        return DeviceArray(
            Allocation(own.address, own.piece, own.used, give_back), array.shape, array.dtype
        )

    def _give_back(self, number: int, place: int, piece: BlockRange, fence: Fence) -> None:
        """Note that an array is garbage; a destructor calls, in any thread."""
        self._returned.append((number, place, fence))

    def _take_back(self) -> None:
        while self._returned:
            number, place, fence = self._returned.popleft()
            self._sets[number][place].allocation.read(fence)
            self._lent[number] -= 1

    def __del__(self) -> None:
        self._take_back()  # the memory is used by others after that


def _addresses(arrays: Arrays) -> tuple[int, ...]:
    return tuple(array.address for array in arrays)
