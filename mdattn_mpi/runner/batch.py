"""A rank's way through a job: its groups' items queue by queue, what is shown, what is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic_ns, perf_counter
from typing import TYPE_CHECKING

from mdattn_mpi.backends import HostArray
from mdattn_mpi.dataset import AnyItem, Output
from mdattn_mpi.errors import LOGGER, ItemError, MdattnError
from mdattn_mpi.lockstep import Deadlines, Step, TimeLimit, launcher, terminal, together
from mdattn_mpi.runner.clock import PhaseClock
from mdattn_mpi.runner.events import Events
from mdattn_mpi.runner.folder import provenance, run_folder, tell_all
from mdattn_mpi.runner.groups import JobGroup
from mdattn_mpi.runner.job import Job, add_seconds, say
from mdattn_mpi.runner.loop import Files, Loop
from mdattn_mpi.runner.progress import Progress
from mdattn_mpi.runner.work import Enqueued, Read, Task, Written

if TYPE_CHECKING:
    from mdattn_mpi.lockstep.counter import SharedCounter

LOOK = 1.0  # seconds between two looks at what other groups have done


def run_items(job: Job) -> None:
    """Collective. Compute what is to be done, queue by queue of the schedule.

    Groups don't wait for each other before the last item is done. What goes wrong in one of them
    lets the others finish what they have in hand, and is then raised on all ranks.
    """
    with recorded(job) as events:
        batch = Batch(job, events)
        try:
            if len(job.groups) == 1 and job.schedule.largest == job.world.size:
                batch.work(job.groups[0], None)
            else:
                run_groups(job, batch)
        finally:
            batch.progress.close()


@contextmanager
def recorded(job: Job) -> Iterator[Events]:
    """Collective. Keep the events of the block in the run folder, if there is room there."""
    world, output = job.world, job.output
    assert output is not None

    def open_events() -> Events:
        path = run_folder(job.spec) / f"events-{world.nodes.index(world.node):04}.jsonl"
        with suppress(OSError):
            return Events(path, world.size, {item.name: item.index for item in output.items})
        return Events()

    events = together(world, "events", open_events)  # all ranks leave it at the same moment
    facts = {"about": _about(job)} if world.rank == 0 else {}
    device = job.executor.describe().get("device", "")
    events.start(world.job, world.rank, host=world.hostname, device_name=device, **facts)
    try:
        yield events
    except BaseException as error:
        events.close(error=str(error))
        raise
    events.close(stopped=job.stopped)


def _about(job: Job) -> dict[str, object]:
    """What a report says of the job as a whole."""
    return {
        **provenance(job.executor),
        "launcher": launcher().name,
        "data": job.spec.data,
        "ranks": job.world.size,
        "todo": len(job.todo),
        "strategies": sorted({plan.strategy for plan in job.plans.values()}),
        "groups": list(job.schedule.reasons),
        "seconds": job.seconds,
    }


def run_groups(job: Job, batch: Batch) -> None:
    """Collective. Do the items in groups; see `run_items`."""
    world, queues = job.world, len(job.groups)
    error: MdattnError | None = None
    from mdattn_mpi.lockstep.counter import SharedCounter

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

    def __init__(self, job: Job, events: Events) -> None:
        spec, world = job.spec, job.world
        assert job.output is not None
        self.job = job
        self.events = events
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
            computing=self.computing,
            device="CPU" if job.executor.name == "cpu" else "GPU",
            terminal=None if world.rank or spec.quiet or spec.verbose else terminal(),
            stops=lambda: world.board.stop_requested,
        )
        # What other groups may do, by name: its state in the ledger before this job.
        todo = set() if world.rank else {item.name for item in job.todo}
        states = zip(job.output.items, job.output.ledger.states(), strict=True)
        self.elsewhere = {item.name: state for item, state in states if item.name in todo}
        self.slowest = 0.0
        self.last = self.looked = perf_counter()

    def work(self, group: JobGroup, counter: SharedCounter | None) -> None:
        """Collective in the group. Do items of the group's queue until none is left."""
        job, board = self.job, self.job.world.board
        loop = Loop(
            group.group,
            group.executor,
            files_of(job, self.output, self.events),
            board=board,
            deadlines=self.deadlines,
            wants_to_stop=lambda: board.stop_requested or self.limit.is_near(2 * self.slowest),
            finished=lambda task: self.finished(task, group),
            failed=lambda item, error: self.failed(item, error, group),
            note=self.events.main.append,
            commit_every=job.spec.commit_every,
        )
        if group.group.rank == 0:
            tell_all()  # its items are the group's
        self.events.device_starts_at(group.executor.timings())
        loop.run(self.tasks(group, counter, loop.clock))
        self.events.device_is_at(group.executor.timings())
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

    def finished(self, task: Task, group: JobGroup) -> None:
        """Take note of an item that this rank's group has committed."""
        item, now = task.item, perf_counter()
        if group.group.rank == 0:
            self.events.done(item.name)
        if self.events.wants_device():
            self.events.device_is_at(group.executor.timings())
        LOGGER.info("item %s done, %.3f s after the one before", item.name, now - self.last)
        self.slowest, self.last = max(self.slowest, now - self.last), now
        self.elsewhere.pop(item.name, None)
        self.progress.finished(item.problem)
        self.job.world.board.progress(self.progress.done, self.progress.total)
        self.look_around()

    def failed(self, item: AnyItem, error: ItemError, group: JobGroup) -> None:
        """Take note of an item that can't be done."""
        if group.group.rank == 0:
            self.events.failed(item.name, str(error))
        self.job.failed.append(error)
        self.elsewhere.pop(item.name, None)
        LOGGER.error("%s", error)
        self.progress.skipped(f"mdattn: {error}")

    def computing(self) -> float:
        """Seconds that this rank's device has computed."""
        return sum(group.executor.timings().get("compute", 0.0) for group in self.job.groups)

    def look_around(self) -> None:
        """Show on rank 0 what other groups have finished, and what failed there."""
        now = perf_counter()
        if not self.elsewhere or now - self.looked < LOOK:
            return
        self.looked = now
        for item, state in zip(self.output.items, self.output.ledger.states(), strict=True):
            if state == self.elsewhere.get(item.name, state):
                continue
            del self.elsewhere[item.name]
            if state == "done":
                self.progress.finished(item.problem)
            else:
                self.progress.skipped(f"mdattn: {self.output.ledger.entry(item).reason}")


def files_of(job: Job, output: Output, events: Events) -> Files:
    """What the loop reads and writes."""
    written = ""  # the item that the next sync comes after

    def read(task: Task, room: Sequence[HostArray]) -> Read:
        began = monotonic_ns()
        for shard, array in zip(task.reads, room, strict=True):
            job.dataset.read(task.item, shard.tensor.name, shard.spans, out=array)
        job.kind.check(task, room)
        events.read.append(("read", task.item.name, began, monotonic_ns()))
        return Read(task, tuple(room))

    def write(enqueued: Enqueued) -> Written:
        task, began = enqueued.task, monotonic_ns()
        # An executor may give more than the job writes, such as an LSE that wasn't asked for.
        arrays = enqueued.download.wait()[: len(task.writes)]
        collected = monotonic_ns()
        job.kind.check_outputs(task, arrays)
        named = {
            shard.tensor.name: array
            for shard, array in zip(task.writes, arrays, strict=True)
            if shard.here
        }
        checksum = output.write(task.item, task.writes[0].spans, named)
        events.write += [
            ("collect", task.item.name, began, collected),
            ("write", task.item.name, collected, monotonic_ns()),
        ]
        nonlocal written
        written = task.item.name
        return Written(task, checksum)

    def sync() -> None:
        began = monotonic_ns()
        output.sync()
        events.write.append(("sync", written, began, monotonic_ns()))

    def commit(finished: Sequence[tuple[Task, list[int]]]) -> None:
        began = monotonic_ns()
        output.ledger.commit_all(
            (task.item, checksums, task.plan.strategy, task.tokens) for task, checksums in finished
        )
        events.write.append(("commit", finished[-1][0].item.name, began, monotonic_ns()))

    return Files(read, write, sync, commit, output.ledger.fail)
