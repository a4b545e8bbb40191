"""A rank's way through a job: its groups' items queue by queue, what is shown, what is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter

from mdattn_mpi.backends import HostArray
from mdattn_mpi.dataset import AnyItem, Output
from mdattn_mpi.errors import LOGGER, ItemError, MdattnError
from mdattn_mpi.lockstep import Deadlines, Step, TimeLimit
from mdattn_mpi.lockstep.counter import SharedCounter
from mdattn_mpi.runner.clock import PhaseClock
from mdattn_mpi.runner.folder import tell_all
from mdattn_mpi.runner.groups import JobGroup
from mdattn_mpi.runner.job import Job, add_seconds, say
from mdattn_mpi.runner.loop import Files, Loop
from mdattn_mpi.runner.progress import Progress
from mdattn_mpi.runner.work import Enqueued, Read, Task, Written

LOOK = 1.0  # seconds between two looks at what other groups have done


def run_items(job: Job) -> None:
    """Collective. Compute what is to be done, queue by queue of the schedule.

    Groups don't wait for each other before the last item is done. What goes wrong in one of them
    lets the others finish what they have in hand, and is then raised on all ranks.
    """
    batch = Batch(job)
    try:
        if len(job.groups) == 1 and job.schedule.largest == job.world.size:
            batch.work(job.groups[0], None)
        else:
            run_groups(job, batch)
    finally:
        batch.progress.close()


def run_groups(job: Job, batch: Batch) -> None:
    """Collective. Do the items in groups; see `run_items`."""
    world, queues = job.world, len(job.groups)
    error: MdattnError | None = None
    with SharedCounter(world.comm, queues, meanwhile=batch.look_around) as counter:
        for group in job.groups:
            if job.stopped or error:
                break
            group.join(world.board)
            try:
                if group.complete:
                    batch.work(group, counter)
            except MdattnError as failure:
                if not failure.agreed:
                    raise
                error = failure
        if job.stopped or error:
            counter.close()
        world.board.join(0, counted=(queues + 1) << 32)
        world.board.enter("groups", deadline=batch.deadlines.of("groups"))
    world.agree(Step(-1, "groups", 0), error=error)


class Batch:
    """What a rank keeps in mind while it works through its groups' items."""

    def __init__(self, job: Job) -> None:
        spec, world = job.spec, job.world
        assert job.output is not None
        self.job = job
        self.output = job.output
        self.deadlines = Deadlines(fixed=spec.deadline)
        self.limit = TimeLimit(spec.max_time)
        say(spec, world, f"mdattn: deadlines: {self.deadlines}")
        self.progress = Progress(
            len(job.items),
            len(job.items) - len(job.todo),
            sum(item.problem.work for item in job.todo),
            shown=world.rank == 0,
            quiet=spec.quiet,
            bar=not spec.verbose,
        )
        self.elsewhere = {} if world.rank else {item.name: item for item in job.todo}
        self.slowest = 0.0
        self.last = self.looked = perf_counter()

    def work(self, group: JobGroup, counter: SharedCounter | None) -> None:
        """Collective in the group. Do items of the group's queue until none is left."""
        job, board = self.job, self.job.world.board
        loop = Loop(
            group.group,
            group.executor,
            files_of(job, self.output),
            board=board,
            deadlines=self.deadlines,
            wants_to_stop=lambda: board.stop_requested or self.limit.is_near(2 * self.slowest),
            finished=self.finished,
            failed=self.failed,
            commit_every=job.spec.commit_every,
        )
        if group.group.rank == 0:
            tell_all()  # its items are the group's
        loop.run(self.tasks(group, counter, loop.clock))
        job.stopped = loop.stopped
        add_seconds(job.phases, loop.clock.seconds)
        add_seconds(job.background, {"read": loop.reads.seconds, "write": loop.writes.seconds})

    def tasks(
        self, group: JobGroup, counter: SharedCounter | None, clock: PhaseClock
    ) -> Iterator[Task]:
        """Items as the group claims them."""
        job, rank = self.job, group.group.rank
        for number in group.claim(job.schedule, counter, lambda: clock.enter("claim")):
            item = job.items[number]
            yield job.kind.task(item, group.plans[item.name], rank)

    def finished(self, task: Task) -> None:
        """Take note of an item that this rank's group has committed."""
        item, now = task.item, perf_counter()
        LOGGER.info("item %s done, %.3f s after the one before", item.name, now - self.last)
        self.slowest, self.last = max(self.slowest, now - self.last), now
        self.elsewhere.pop(item.name, None)
        self.progress.finished(item.problem)
        self.job.world.board.progress(self.progress.done, self.progress.total)
        self.look_around()

    def failed(self, item: AnyItem, error: ItemError) -> None:
        """Take note of an item that can't be done."""
        self.job.failed.append(error)
        LOGGER.error("%s", error)
        self.progress.skipped(f"mdattn: {error}")

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


def files_of(job: Job, output: Output) -> Files:
    """What the loop reads and writes."""

    def read(task: Task, room: Sequence[HostArray]) -> Read:
        for shard, array in zip(task.reads, room, strict=True):
            job.dataset.read(task.item, shard.tensor.name, shard.spans, out=array)
        job.kind.check(task, room)
        return Read(task, tuple(room))

    def write(enqueued: Enqueued) -> Written:
        task = enqueued.task
        # An executor may give more than the job writes, such as an LSE that wasn't asked for.
        arrays = enqueued.download.wait()[: len(task.writes)]
        job.kind.check_outputs(task, arrays)
        named = {
            shard.tensor.name: array
            for shard, array in zip(task.writes, arrays, strict=True)
            if shard.here
        }
        return Written(task, output.write(task.item, task.writes[0].spans, named))

    def commit(finished: Sequence[tuple[Task, list[int]]]) -> None:
        output.ledger.commit_all(
            (task.item, checksums, task.plan.strategy, task.tokens) for task, checksums in finished
        )

    return Files(read, write, output.sync, commit, output.ledger.fail)
