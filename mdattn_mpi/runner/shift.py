"""A rank's way through its items: which group does which, what is shown, what is written."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from time import perf_counter

from mdattn_mpi.backends import Backend
from mdattn_mpi.dataset import NUMPY, TENSORS, Item, Output
from mdattn_mpi.errors import ItemError, MdattnError
from mdattn_mpi.lockstep import Deadlines, Step, TimeLimit
from mdattn_mpi.lockstep.counter import SharedCounter
from mdattn_mpi.partition import partition_of, token_count
from mdattn_mpi.problem import Plan
from mdattn_mpi.runner.clock import PhaseClock
from mdattn_mpi.runner.finite import check_finite, check_output, is_finite
from mdattn_mpi.runner.job import WIDTH, Job, add_seconds, say
from mdattn_mpi.runner.log import LOGGER
from mdattn_mpi.runner.loop import Files, Loop, Shards, Work
from mdattn_mpi.runner.progress import Progress
from mdattn_mpi.runner.teams import Team

LOOK = 1.0  # seconds between two looks at what other groups have done


def run_items(job: Job) -> None:
    """Collective. Compute what is to be done, queue by queue of the schedule.

    Groups don't wait for each other before the last item is done. What goes wrong in one of them
    lets the others finish what they have in hand, and is then raised on all ranks.
    """
    shift = Shift(job)
    try:
        if len(job.teams) == 1 and job.schedule.largest == job.world.size:
            shift.work(job.teams[0], None)
        else:
            run_groups(job, shift)
    finally:
        shift.progress.close()


def run_groups(job: Job, shift: Shift) -> None:
    """Collective. Do the items in groups; see `run_items`."""
    world, queues = job.world, len(job.teams)
    error: MdattnError | None = None
    with SharedCounter(world.comm, queues, meanwhile=shift.look_around) as counter:
        for team in job.teams:
            if job.stopped or error:
                break
            team.join(world.board)
            try:
                if team.complete:
                    shift.work(team, counter)
            except MdattnError as failure:
                if not failure.agreed:
                    raise
                error = failure
        if job.stopped or error:
            counter.close()
        world.board.join(0, counted=(queues + 1) << 32)
        world.board.enter("groups", deadline=shift.deadlines.of("groups"))
    world.agree(Step(-1, "groups", 0), error=error)


class Shift:
    """What a rank keeps in mind while it works through its teams' items."""

    def __init__(self, job: Job) -> None:
        spec, world = job.spec, job.world
        assert job.output is not None
        self.job = job
        self.output = job.output
        self.deadlines = Deadlines(fixed=spec.deadline)
        self.limit = TimeLimit(spec.max_time)
        say(
            world,
            textwrap.fill(
                f"mdattn: deadlines: {self.deadlines}", WIDTH, subsequent_indent=" " * 12
            ),
        )
        self.progress = Progress(
            len(job.dataset.items),
            len(job.dataset.items) - len(job.todo),
            sum(item.problem.flops for item in job.todo),
            shown=world.rank == 0,
        )
        self.elsewhere = {} if world.rank else {item.name: item for item in job.todo}
        self.slowest = 0.0
        self.last = self.looked = perf_counter()

    def work(self, team: Team, counter: SharedCounter | None) -> None:
        """Collective in the team's group. Do items of the team's queue until none is left."""
        job, board = self.job, self.job.world.board
        loop = Loop(
            team.group,
            team.backend,
            files_of(job, self.output),
            board=board,
            deadlines=self.deadlines,
            wants_to_stop=lambda: board.stop_requested or self.limit.is_near(2 * self.slowest),
            finished=self.finished,
            failed=self.failed,
        )
        loop.run(self.tasks(team, counter, loop.clock))
        job.stopped = loop.stopped
        add_seconds(job.phases, loop.clock.seconds)
        add_seconds(job.background, {"read": loop.reads.seconds, "write": loop.writes.seconds})

    def tasks(self, team: Team, counter: SharedCounter | None, clock: PhaseClock) -> Iterator[Work]:
        """Items as the team takes them."""
        items, rank = self.job.dataset.items, team.group.rank
        for number in team.turns(self.job.schedule, counter, lambda: clock.enter("deal")):
            plan = team.plans[items[number].name]
            yield work_on(items[number], plan, rank, team.backend)

    def finished(self, work: Work) -> None:
        """Take note of an item that this rank's group has committed."""
        now = perf_counter()
        LOGGER.info("item %s done, %.3f s after the one before", work.item.name, now - self.last)
        self.slowest, self.last = max(self.slowest, now - self.last), now
        self.elsewhere.pop(work.item.name, None)
        self.progress.finished(work.item.problem)
        self.job.world.board.progress(self.progress.done, self.progress.total)
        self.look_around()

    def failed(self, item: Item, failure: ItemError) -> None:
        """Take note of an item that can't be done."""
        self.job.failed.append(failure)
        LOGGER.error("%s", failure)
        self.progress.skipped(f"mdattn: {failure}")

    def look_around(self) -> None:
        """Show on rank 0 what other groups have finished."""
        now = perf_counter()
        if not self.elsewhere or now - self.looked < LOOK:
            return
        self.looked = now
        for item, state in zip(self.output.items, self.output.ledger.states(), strict=True):
            if state == "done" and item.name in self.elsewhere:
                del self.elsewhere[item.name]
                self.progress.finished(item.problem)


def work_on(item: Item, plan: Plan, rank: int, backend: Backend) -> Work:
    """Find out what is a rank's part of an item, and make room for it in host memory."""
    owners, problem = partition_of(plan), plan.problem
    query, kv = owners.query[rank], owners.kv[rank]
    q_rows, kv_rows, dtype = token_count(query), token_count(kv), NUMPY[problem.dtype]
    shards = (
        backend.host_empty((q_rows, problem.q_heads, problem.head_dim), dtype),
        backend.host_empty((kv_rows, problem.kv_heads, problem.head_dim), dtype),
        backend.host_empty((kv_rows, problem.kv_heads, problem.v_head_dim), dtype),
    )
    return Work(item, plan, query, kv, shards)


def files_of(job: Job, output: Output) -> Files:
    """What the loop reads and writes."""
    dataset, spec = job.dataset, job.spec

    def read(work: Work) -> Shards:
        spans = (work.query, work.kv, work.kv)
        shards, work.shards = work.shards, None  # whoever takes them next is the last to need them
        assert shards is not None
        for tensor, runs, shard in zip(TENSORS, spans, shards, strict=True):
            dataset.read(work.item, tensor, runs, out=shard)
        if spec.nonfinite == "refuse":
            check_finite(shards, spans, dataset.path, work.item.name)
        return shards

    def write(work: Work) -> int:
        assert work.download is not None
        out, lse = work.download.wait()
        work.download = None  # what it holds can be used again
        wanted = lse if spec.lse else None
        check_output(
            work.item,
            work.query,
            out,
            wanted,
            backend=work.plan.backend,
            may_be_nonfinite=lambda: spec.nonfinite == "pass" and not is_finite(dataset, work.item),
        )
        checksum = output.write(work.item, work.query, out, wanted)
        output.sync()
        return checksum

    def commit(work: Work, checksums: list[int]) -> None:
        shards = partition_of(work.plan).query
        output.ledger.commit(work.item, checksums, work.plan.strategy, shards)

    return Files(read, write, commit, output.ledger.fail)
