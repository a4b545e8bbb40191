"""Who is to blame: judged from made-up records, with no process and no clock."""

from dataclasses import replace

import pytest

from mdattn_mpi.lockstep import Board
from mdattn_mpi.lockstep.blame import (
    BLIND,
    BY_MPI,
    SILENT,
    STOPPED,
    Heartbeats,
    Lateness,
    first_lost,
    is_clear,
    may_wait_longer,
    verdict_on_exit,
)
from mdattn_mpi.lockstep.record import ENDED, ROUND_BITS, STARTED, Record


def record(rank: int, **changes: object) -> Record:
    board = Board()
    board.identify(job=1, rank=rank, size=4, device="cpu")
    board.enter("enqueue", "item-2", 5)
    made = replace(board.record(), state=STARTED, folder="/run", since=100.0, deadline=105.0)
    return replace(made, **changes)  # type: ignore[arg-type]


# -- exits ----------------------------------------------------------------------------------------


def test_leaving_in_order_is_no_death_whatever_the_code() -> None:
    assert verdict_on_exit(record(0, state=ENDED), 75) is None


@pytest.mark.parametrize(
    ("changes", "code", "what", "exit_code"),
    [
        ({}, 0, "exited with code 0 without leaving the job", 75),
        ({}, -9, "was killed by signal 9 (SIGKILL)", 75),
        ({}, -60, "was killed by signal 60 (a real-time signal)", 75),
        ({"state": ENDED}, -11, "was killed by signal 11 (SIGSEGV)", 75),
        ({"fault": "raised KeyError: 'x'", "exit_code": 4}, 4, "raised KeyError: 'x'", 4),
        ({"fault": "called sys.exit(0)"}, 0, "called sys.exit(0)", 75),
    ],
)
def test_any_other_exit_is_a_death(
    changes: dict[str, object], code: int, what: str, exit_code: int
) -> None:
    assert verdict_on_exit(record(0, **changes), code) == (what, exit_code)


# -- lateness -------------------------------------------------------------------------------------


def look(lateness: Lateness, own: Record, *times: float, stopped: bool = False) -> list[object]:
    return [lateness.look(own, now, stopped=stopped) for now in times]


def test_late_is_who_is_over_the_deadline_in_two_looks_at_the_same_phase() -> None:
    lateness = Lateness(100.0)
    own = record(0)
    assert look(lateness, own, 101.0, 103.0, 104.9) == [None, None, None]
    assert look(lateness, own, 105.1) == [None]
    assert lateness.suspected
    assert look(lateness, replace(own, phases=own.phases + 1), 105.2) == [None]
    assert look(lateness, replace(own, phases=own.phases + 1), 105.3) == [5.0]


def test_without_a_phase_nobody_is_late() -> None:
    assert look(Lateness(0.0), record(0, deadline=0.0), 1.0, 2.0, 3.0) == [None] * 3


def test_time_in_which_the_whole_node_was_suspended_is_given_back() -> None:
    own, lateness = record(0), Lateness(100.0)
    assert look(lateness, own, 101.0, 102.0, 152.0, 154.9) == [None] * 4
    # 50 s of suspension and 2.9 s that may have been one
    assert look(lateness, own, 156.0, 157.0, 157.9, 158.0) == [None] * 3 + [pytest.approx(57.9)]
    assert lateness.suspected


def test_a_rank_alone_may_not_be_stopped_for_long_even_in_a_long_phase() -> None:
    own, lateness = record(0, deadline=5000.0), Lateness(100.0)
    times = [100.0 + second for second in range(int(STOPPED) + 2)]
    assert look(lateness, own, *times[:-1], stopped=True) == [None] * (len(times) - 1)
    assert look(lateness, own, times[-1], stopped=True) == [STOPPED]
    assert look(lateness, own, times[-1] + 1) == [None]  # it goes on


def test_who_waits_without_a_run_folder_lets_others_speak_first() -> None:
    own, lateness = record(0, waiting=True, folder=""), Lateness(104.0)
    assert look(lateness, own, 105.1, 105.2, 105.0 + BLIND + 0.1) == [None] * 3
    assert look(lateness, own, 105.0 + BLIND + 0.2) == [5.0]


# -- waiting --------------------------------------------------------------------------------------


def test_who_waits_for_a_busy_rank_may_wait_longer() -> None:
    own = record(0, agreements=5, waiting=True, phase="read")
    busy = record(1, agreements=4, phase="read")
    assert may_wait_longer(own, [own, busy])
    assert not may_wait_longer(busy, [own, busy])
    assert not may_wait_longer(own, [own, replace(busy, group=1)])
    assert not may_wait_longer(own, [own, replace(busy, fault="dead")])
    assert not may_wait_longer(own, [own, replace(busy, state=ENDED)])
    assert not may_wait_longer(replace(own, waiting=False), [own, busy])
    assert may_wait_longer(replace(own, waiting=False, phase="agree begin"), [own, busy])
    assert not may_wait_longer(own, [own, replace(busy, agreements=5, phases=own.phases)])


def test_all_groups_come_before_what_follows_them() -> None:
    later = record(0, agreements=(1 << ROUND_BITS) + 1, waiting=True)
    elsewhere = record(1, agreements=4, group=1, waiting=True)
    assert may_wait_longer(later, [later, elsewhere])
    assert not may_wait_longer(elsewhere, [later, elsewhere])


def test_a_rank_that_nobody_watches_any_more_is_not_waited_for() -> None:
    heartbeats, busy = Heartbeats(), record(1, beats=3)
    assert heartbeats.alive([busy], 1000.0) == [busy]
    assert heartbeats.alive([busy], 1000.0 + SILENT - 1) == [busy]
    again = replace(busy, beats=4)
    assert heartbeats.alive([again], 1000.0 + SILENT + 1) == [again]
    assert heartbeats.alive([again], 1000.0 + 2 * SILENT) == [again]
    assert heartbeats.alive([again], 1000.0 + 2 * SILENT + 2) == []


# -- who was first --------------------------------------------------------------------------------


def test_the_dead_are_judged_by_the_clock() -> None:
    first = record(2, fault="x", fault_time=10.0, agreements=9)
    later = record(0, fault="y", fault_time=10.5, agreements=3)
    assert first_lost(later, [first, record(1)]) is first


def test_a_death_explains_errors_of_mpi() -> None:
    noticed = record(0, fault=f"{BY_MPI}: no such process", fault_time=5.0)
    dead = record(1, fault="was killed", fault_time=5.1)
    assert first_lost(noticed, [dead]) is dead
    assert first_lost(noticed, [record(1)]) is noticed


def test_a_death_explains_lateness() -> None:
    late = record(0, fault="x", fault_time=5.0, late=True)
    dead = record(1, fault="y", fault_time=6.0)
    assert first_lost(late, [dead]) is dead


def test_the_late_are_judged_by_progress() -> None:
    behind = record(3, agreements=4, phases=9)
    waits = record(0, agreements=4, phases=10, fault="late", late=True)
    further = record(1, agreements=5, phases=9)
    assert first_lost(waits, [further, behind]) is behind


def test_equal_progress_is_decided_by_who_is_stopped_and_who_waits() -> None:
    stopped = record(2, process_state="T", waiting=True)
    assert first_lost(record(0), [record(1), stopped]) is stopped
    busy = record(1)
    assert first_lost(record(0, waiting=True), [record(2, waiting=True), busy]) is busy


def test_ranks_of_other_groups_and_those_that_are_done_are_not_behind() -> None:
    own = record(0, agreements=7, phases=7)
    other = record(1, agreements=2, group=1)
    done = record(2, agreements=1, state=ENDED)
    assert first_lost(own, [other, done]) is own


def test_an_error_of_mpi_is_explained_by_a_death_alone() -> None:
    """MPI may notice a death before the dead rank's own watchdog does."""
    asked = 50.0
    own = record(0, fault=f"{BY_MPI}: process_vm_readv failed (errno 3)")
    alive, also = record(1, heartbeat=60.0), record(2, heartbeat=60.0, fault=f"{BY_MPI}: reset")
    dead = replace(alive, fault="was killed by signal 9 (SIGKILL)")
    assert not is_clear(own, [alive, also], asked)
    assert is_clear(own, [dead, also], asked)
    assert is_clear(record(0, fault="raised KeyError: 'x'"), [alive, also], asked)
    assert not is_clear(own, [dead, replace(also, heartbeat=40.0)], asked)
