"""Device memory of recorded steps: what a step asks for lies at the same addresses every time.

A step is recorded by running it, more than once: its n-th array is always at the n-th place. Arrays
of one size share a place if one is garbage before the other is asked for, under fences as
everywhere; those of a recording mean nothing outside of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np

from mdattn_mpi.devices.cuda.memory import SIMILAR, Allocation, BlockRange, DeviceArray, Memory
from mdattn_mpi.devices.cuda.order import Fence, extend
from mdattn_mpi.errors import DeviceError


@dataclass(eq=False)
class Holding:
    """The memory of one step.

    Attributes
    ----------
    places
        Of its arrays, in the order in which they are asked for; some are there more than once.
    pieces
        All memory that it was given.
    begin
        What comes before any of it is used.

    """

    places: list[BlockRange] = field(default_factory=list)
    pieces: list[BlockRange] = field(default_factory=list)
    begin: Fence = field(default_factory=dict)


class Arena:
    """What `memory.Memory` is to the rest, while steps are recorded.

    Parameters
    ----------
    memory
        Where it takes memory from.

    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._holding = Holding()
        self._given: Mapping[int, int] = {}
        self._asked = 0
        self._free: dict[BlockRange, Fence] = {}
        self._pass = 0

    def start(self, holding: Holding, given: Mapping[int, int]) -> None:
        """Begin to record once more; the arrays of the numbers in `given` lie at its addresses."""
        self._holding, self._given = holding, given
        self._asked, self._free = 0, {}
        self._pass += 1

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        """An array with undefined contents.

        Raises
        ------
        DeviceError
            There is no memory for it, or the recording isn't as it was before.

        """
        number, places = self._asked, self._holding.places
        self._asked += 1
        if number == len(places):
            places.append(self._find(prod(shape) * dtype.itemsize))
        place = places[number]
        if number in self._given:
            return DeviceArray(Allocation(self._given[number]), shape, dtype)
        used = self._free.pop(place, {} if number == places.index(place) else None)
        if used is None:
            raise DeviceError("a step isn't recorded as it was before")
        give_back = partial(self._take_back, self._pass)
        return DeviceArray(Allocation(self._address(place), place, used, give_back), shape, dtype)

    def close(self) -> None:
        """Do nothing: frames give their memory back."""

    def number_of(self, array: DeviceArray) -> int:
        """Return the number of an array that is still there; −1 where it is part of one."""
        for number in reversed(range(self._asked)):
            if self._address(self._holding.places[number]) == array.address:
                return number
        return -1

    def release(self, holding: Holding, fence: Fence) -> None:
        """Give the memory of a step back, to be used after `fence`."""
        for piece in holding.pieces:
            self._memory.give_back(piece, fence)

    def _find(self, nbytes: int) -> BlockRange:
        """Find a place that is free again, or take memory for it."""
        size = self._memory.size_of(nbytes)
        for place in self._free:
            if size <= place.stop - place.start <= SIMILAR * size:
                return place
        piece, fence = self._memory.cut(nbytes)
        extend(self._holding.begin, fence)
        self._holding.pieces.append(piece)
        return piece

    def _address(self, place: BlockRange) -> int:
        return self._memory.blocks[place.block] + place.start

    def _take_back(self, of_pass: int, place: BlockRange, fence: Fence) -> None:
        if of_pass == self._pass:
            self._free[place] = fence
