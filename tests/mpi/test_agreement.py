"""Agreement under a real mpirun: what passes, what all ranks raise together, and who is named."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

from mdattn_mpi.errors import DeviceError, DisagreementError, ItemError, MdattnError
from mdattn_mpi.lockstep import Group, Step, World, agreement
from tests.support.ranks import on_ranks


def step(item: int = 3, phase: str = "begin", facts: int = 77, **described: object) -> Step:
    return Step(item, phase, facts, lambda: described)


@contextmanager
def both_ways(world: World) -> Iterator[tuple[Group, Group]]:
    """Give two groups of all ranks: words have slots in one, and are gathered in the other."""
    slots = agreement.SLOTS
    with_slots = world.split(0, world.rank)
    agreement.SLOTS = 0
    gathering = world.split(0, world.rank)
    agreement.SLOTS = slots
    assert with_slots._ballot.size == gathering._ballot.size + world.size
    yield with_slots, gathering
    for group in (with_slots, gathering):
        group.free()


@on_ranks()
def test_all_alike_gives_everybodys_words(world: World) -> None:
    with both_ways(world) as groups:
        for group in groups:
            for item in range(50):
                word = (0xFFFFFFFFFFFFFFFF - world.rank - item) & 0xFFFFFFFFFFFFFFFF
                found = group.agree(step(item), word=word)
                everybodys = tuple(0xFFFFFFFFFFFFFFFF - rank - item for rank in range(world.size))
                assert found.words == everybodys
                assert not found.stop
                reader = item % world.size
                found = group.agree(step(item), word=word, reader=reader)
                assert found.words == (everybodys if world.rank == reader else ())
            assert group.agree(step(), word=0).words == (0,) * world.size
            assert group.agree(step(), count=world.rank + 3).least == 3
            assert group.agree(step()).words == ()


@on_ranks(1, 3)
def test_one_wish_to_stop_is_everybodys(world: World) -> None:
    for who in range(world.size):
        assert world.agree(step(), stop=world.rank == who).stop
        assert not world.agree(step()).stop


@on_ranks(2, 4)
def test_agreement_is_a_barrier(world: World) -> None:
    """Nobody passes before the last one came: each rank in turn bumps what all others read."""
    mine, sums = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for turn in range(200):
        mine[0] = turn
        world.agree(step(turn))
        world.control.Allreduce(mine, sums)
        assert sums[0] == turn * world.size


@on_ranks()
def test_an_error_is_raised_by_all_as_the_lowest_rank_brought_it(world: World) -> None:
    for first in range(world.size):
        error = ItemError(f"shard {world.rank} is bad", item="sätze/7", fix="repair it")
        with pytest.raises(ItemError) as caught:
            world.agree(step(), error=error if world.rank >= first else None)
        assert caught.value.what == f"shard {first} is bad"
        assert caught.value.rank == first
        assert caught.value.item == "sätze/7"
        assert caught.value.agreed
        world.agree(step())  # and they can go on


@on_ranks(3)
def test_an_error_wins_over_a_disagreement(world: World) -> None:
    with pytest.raises(DeviceError, match="no memory"):
        world.agree(step(world.rank), error=DeviceError("no memory") if world.rank == 1 else None)


@on_ranks()
def test_a_refused_item_ends_nothing_and_everybodys_words_arrive(world: World) -> None:
    with both_ways(world) as groups:
        for group, first in itertools.product(groups, range(world.size)):
            error = ItemError(f"shard {world.rank} is bad", item="item-7")
            found = group.agree(
                step(), refused=error if world.rank >= first else None, word=world.rank, stop=True
            )
            assert found.refused is not None
            assert found.refused.what == f"shard {first} is bad"
            assert found.refused.rank == first
            assert found.unwritten is None
            assert found.stop
            assert found.words == tuple(range(world.size))
            assert group.agree(step()).refused is None


@on_ranks()
def test_the_item_ahead_and_the_one_behind_are_refused_apart(world: World) -> None:
    with both_ways(world) as groups:
        for group, first in itertools.product(groups, range(world.size)):
            ahead = ItemError("no number", item="item-8") if world.rank == 0 else None
            behind = ItemError(f"NaN on {world.rank}", item="item-6")
            found = group.agree(
                step(),
                refused=ahead,
                unwritten=behind if world.rank >= first else None,
                word=7,
                reader=0,
            )
            assert found.refused is not None
            assert (found.refused.what, found.refused.item) == ("no number", "item-8")
            assert found.unwritten is not None
            assert (found.unwritten.what, found.unwritten.rank) == (f"NaN on {first}", first)
            after = group.agree(step(), unwritten=behind if world.rank == first else None)
            assert after.refused is None
            assert after.unwritten is not None
            assert group.agree(step()).unwritten is None


@on_ranks(2, 3)
def test_who_differs_is_named_where_words_are_gathered(world: World) -> None:
    """A rank that has no item behind gives no word: nothing is gathered before all have agreed."""
    with both_ways(world) as groups:
        for group in groups:
            odd = world.rank == 1
            with pytest.raises(DisagreementError, match="committed item"):
                group.agree(
                    step(facts=odd, **{"committed item": -1 if odd else 4}),
                    word=None if odd else 9,
                    reader=0,
                )
            with pytest.raises(DeviceError, match="no memory"):
                group.agree(step(), error=DeviceError("no memory") if odd else None, word=1)
            assert group.agree(step(), word=1).words == (1,) * world.size


@on_ranks(3)
def test_an_error_wins_over_a_refused_item(world: World) -> None:
    refused = ItemError("not a number") if world.rank < 2 else None
    error = DeviceError("no memory") if world.rank == 2 else None
    with pytest.raises(DeviceError, match="no memory"):
        world.agree(step(), error=error, refused=refused)
    world.agree(step())


DIFFERENCES = {
    "item index": lambda rank: step(3 + (rank == 1)),
    "phase": lambda rank: step(phase="commit" if rank == 1 else "begin"),
    "q_tokens": lambda rank: step(facts=8 + (rank == 1), q_tokens=4096 + (rank == 1)),
    "dtype": lambda rank: step(facts=1 << (rank == 1), dtype=["float16", "bfloat16"][rank == 1]),
    "strategy": lambda rank: step(facts=5 - (rank == 1), strategy=["ring", "ulysses"][rank == 1]),
    "engine_digest": lambda rank: step(facts=rank == 1, engine_digest="ab"[rank == 1]),
}


@on_ranks(2, 4)
def test_a_rank_that_differs_is_named_with_what_it_differs_in(world: World) -> None:
    for field, make in DIFFERENCES.items():
        with pytest.raises(DisagreementError) as caught:
            world.agree(make(world.rank))
        text = str(caught.value)
        assert f"differ in {field} (" in text
        assert "on rank 1" in text
        assert caught.value.exit_code == 3
        assert caught.value.agreed
        world.agree(step())


@on_ranks(2)
def test_a_difference_without_a_name_is_still_found(world: World) -> None:
    with pytest.raises(DisagreementError, match="has no name here"):
        world.agree(step(facts=world.rank))


@on_ranks(4)
def test_groups_agree_apart_and_the_world_together(world: World) -> None:
    group = world.split(world.rank % 2, -world.rank)
    assert (group.rank, group.size) == (1 - world.rank // 2, 2)
    for item in range(world.rank % 2 + 1):
        assert group.agree(step(item), word=world.rank).words == (
            2 + world.rank % 2,
            world.rank % 2,
        )
    with pytest.raises(MdattnError, match="the odd group") if world.rank % 2 else nullcontext():
        group.agree(step(), error=DeviceError("the odd group") if world.rank == 3 else None)
    error = DeviceError("bad") if world.rank == 2 else None
    with pytest.raises(DeviceError) if world.rank % 2 == 0 else nullcontext() as caught:
        group.agree(step(), error=error)
    assert caught is None or caught.value.rank == 2  # as the job counts, not the group
    with pytest.raises(DisagreementError) as differ:
        group.agree(step(world.rank // 2))
    assert f"0 on rank {world.rank % 2}, 1 on rank {world.rank % 2 + 2}" in str(differ.value)
    group.free()
    world.agree(step())
