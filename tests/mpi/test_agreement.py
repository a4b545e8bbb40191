from tests.support.mpirun import on_ranks
from mdattn_mpi.lockstep import Step


@on_ranks()
def test_checksums_and_stop(world):
    for i in range(5):
        a = world.agree(
            Step(i, "begin", 77), checksum=world.rank * 1000 + i, stop=world.rank == world.size - 1
        )
        assert a.stop
        assert a.checksums == tuple(r * 1000 + i for r in range(world.size))
    a = world.agree(Step(9, "begin", 77))
    assert not a.stop
