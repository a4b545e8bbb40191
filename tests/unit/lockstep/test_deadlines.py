"""How long a phase may last, and when the job must be over."""

import time

from mdattn_mpi.lockstep import Deadlines, TimeLimit


def test_long_at_first_then_scaled() -> None:
    deadlines = Deadlines(first=1000, minimum=10, scale=5)
    assert deadlines.of("read") == 1000
    deadlines.took("read", 0.5)
    assert deadlines.of("read") == 10
    deadlines.took("read", 4)
    deadlines.took("read", 1)
    assert deadlines.of("read") == 20
    assert deadlines.of("write") == 1000


def test_more_work_may_take_longer() -> None:
    deadlines = Deadlines(first=1000, minimum=1, scale=10)
    deadlines.took("enqueue", 2.0, work=100)
    assert deadlines.of("enqueue", 1000) == 200
    assert deadlines.of("enqueue", 1) == 20  # what doesn't scale isn't forgotten
    deadlines.took("enqueue", 0.1, work=1)
    assert deadlines.of("enqueue", 1000) == 1000


def test_a_fixed_deadline_is_the_only_one() -> None:
    deadlines = Deadlines(fixed=3)
    deadlines.took("read", 100)
    assert deadlines.of("read", 1e9) == 3
    assert str(deadlines) == "3 s for every phase"
    assert Deadlines(fixed=0).of("read") == Deadlines().first  # 0 means automatic


def test_the_nearer_end_counts() -> None:
    now = time.time()
    assert TimeLimit(environment={}).time_left() is None
    assert not TimeLimit(environment={}).is_near(1e9)
    slurm = {"SLURM_JOB_END_TIME": str(int(now) + 1000)}
    assert 900 < (TimeLimit(None, slurm).time_left() or 0) <= 1000
    assert 400 < (TimeLimit(500, slurm).time_left() or 0) <= 500
    assert 900 < (TimeLimit(5000, slurm).time_left() or 0) <= 1000
    assert TimeLimit(500, slurm).is_near(600)
    assert not TimeLimit(500, slurm).is_near(100)
    assert TimeLimit(0, {"SLURM_JOB_END_TIME": "N/A"}).time_left() is None
