"""Start and end of the world, and bytes between ranks."""

import os

import pytest

from mdattn_mpi.lockstep import World, group
from mdattn_mpi.lockstep import world as world_module
from tests.support.mpirun import mpirun
from tests.support.ranks import on_ranks


@on_ranks()
def test_bytes_reach_everybody(world: World) -> None:
    for root in range(world.size):
        for data in (b"", b"x", os.urandom(100_003)):
            whole = world.bcast_bytes(data if world.rank == root else None, root)
            assert world.allgather(whole.hex()) == [whole.hex()] * world.size
            assert len(whole) == len(world.bcast_bytes(whole, root))


@on_ranks(3)
def test_what_is_gathered_may_differ_in_length(world: World) -> None:
    assert world.allgather("ß" * world.rank * 1000) == ["", "ß" * 1000, "ß" * 2000]


@on_ranks(2, 3)
def test_what_is_too_long_for_one_message_goes_in_pieces(world: World) -> None:
    data = bytes(range(256)) * 40 + b"end"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "PIECE", 1000)
        assert world.bcast_bytes(data if world.rank == 1 else None, 1) == data


@on_ranks(1, 3)
def test_local_rank_and_size(world: World) -> None:
    assert (world.local_rank, world.local_size) == (world.rank, world.size)
    assert world.hostname == os.uname().nodename
    assert len(set(world.allgather(world.job))) == 1


@on_ranks(3)
def test_local_rank_without_a_launcher_that_tells(world: World) -> None:
    again = World(world.comm, world_module.Launcher(), world.board)
    assert (again.local_rank, again.local_size) == (world.rank, world.size)


SCRIPT = """
import sys
from mdattn_mpi.lockstep import watch, start
def main():
    world = start()
    print("a world of", world.size)
    return 0
sys.exit(watch(main))
"""


def test_worlds_of_one_are_noticed_and_told_once() -> None:
    """What a launcher of another MPI does: each process believes to be alone."""
    assert "a world of 2" in mpirun(2, ["-c", SCRIPT], check=True).stdout
    told = 0
    for rank in range(2):
        code = f"""
import os, subprocess, sys
kept = {{k: v for k, v in os.environ.items() if not k.startswith(("OMPI_COMM", "PMIX", "PRTE"))}}
kept.update(PMI_RANK="{rank}", PMI_SIZE="2")
sys.exit(subprocess.run([sys.executable, "-c", {SCRIPT!r}], env=kept).returncode)
"""
        done = mpirun(1, ["-c", code])
        assert done.returncode == 2, done.stderr
        assert "a world of" not in done.stdout
        said = " ".join(done.stderr.split())
        told += said.count("alone in a world of 1")
        if rank == 0:
            assert "MPICH" in said
            assert "--mpi=pmix" in said
    assert told == 1
