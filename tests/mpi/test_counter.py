"""The counter that groups share: complete, closable, and answered while rank 0 computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.support.ranks import on_ranks

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.world import World


@on_ranks(1, 2, 4)
def test_every_number_is_handed_out_once(world: World) -> None:
    from mpi4py import MPI

    from mdattn_mpi.lockstep.counter import SharedCounter

    with SharedCounter(MPI.COMM_WORLD, 3) as counter:
        mine: list[list[int]] = [[], [], []]
        for slot in (0, 2):
            while (number := counter.claim(slot)) < 100:
                mine[slot].append(number)
    for slot in (0, 1, 2):
        seen = np.zeros(100, np.int64)
        seen[mine[slot]] += 1
        total = np.empty_like(seen)
        MPI.COMM_WORLD.Allreduce(seen, total)
        assert (total == (0 if slot == 1 else 1)).all()
        assert mine[slot] == sorted(mine[slot])


@on_ranks(2, 3)
def test_rank_0_answers_while_it_computes(world: World) -> None:
    from mpi4py import MPI

    from mdattn_mpi.lockstep.counter import SharedCounter

    comm = MPI.COMM_WORLD
    with SharedCounter(comm, 1) as counter:
        if comm.rank == 0:
            a = np.ones((400, 400))
            while counter._next[0] < 20 * (comm.size - 1):  # nothing here enters MPI
                a = np.clip(a @ a, 0, 1)
        else:
            for _ in range(20):
                counter.claim(0)


@on_ranks(1, 3)
def test_closed_by_one_it_is_closed_for_all(world: World) -> None:
    from mpi4py import MPI

    from mdattn_mpi.lockstep.counter import CLOSED, SharedCounter

    comm = MPI.COMM_WORLD
    with SharedCounter(comm, 2) as counter:
        assert counter.claim(0) < CLOSED
        comm.Barrier()
        if comm.rank == comm.size - 1:
            counter.close()
            assert counter.claim(1) >= CLOSED
        comm.Barrier()
        assert counter.claim(0) >= CLOSED
        assert counter.claim(1) >= CLOSED


@on_ranks(2)
def test_an_error_leaves_without_waiting_for_the_others(world: World) -> None:
    from mpi4py import MPI

    from mdattn_mpi.lockstep.counter import SharedCounter

    try:
        with SharedCounter(MPI.COMM_WORLD, 1) as counter:
            counter._ask(0)
            if MPI.COMM_WORLD.rank == 1:
                raise OSError("this rank alone")
            while counter._next[0] < 2:  # until the other has asked too
                pass
            raise OSError("and later this one")
    except OSError:
        pass
