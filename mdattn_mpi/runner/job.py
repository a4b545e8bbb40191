"""A job from its command line to its exit code: open, run the loop, close."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from mdattn_mpi.backends import Backend, backend_name, open_backend
from mdattn_mpi.dataset import Dataset, Item, Output, create_output, open_dataset, open_output
from mdattn_mpi.errors import ItemError, MdattnError, RejectedError
from mdattn_mpi.lockstep import Deadlines, Group, Step, TimeLimit, World
from mdattn_mpi.lockstep.counter import SharedCounter
from mdattn_mpi.partition import partition_of
from mdattn_mpi.problem import AttentionProblem, Plan, digest_of
from mdattn_mpi.runner.dealing import RATES, Schedule, deal
from mdattn_mpi.runner.finite import check_finite
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.log import LOGGER, open_log
from mdattn_mpi.runner.loop import Files, Loop, Shards, Work
from mdattn_mpi.runner.progress import Progress
from mdattn_mpi.runner.provenance import provenance
from mdattn_mpi.runner.report import closing_words, rank_times, summarize, write_summary
from mdattn_mpi.runner.teams import Team, memory_of_a_rank, open_teams, smallest

T = TypeVar("T")

WIDTH = 80  # columns of a narrow terminal
LOOK = 1.0  # seconds between two looks at what other groups have done
KINDS = 6  # kinds of item that are described one by one


@dataclass
class Job:
    """An open job: everything has been checked and agreed on, nothing computed yet."""

    spec: JobSpec
    world: World
    dataset: Dataset
    schedule: Schedule
    teams: list[Team]  # one a phase of the schedule
    output: Output | None = None
    todo: list[Item] = field(default_factory=list)
    failed: list[ItemError] = field(default_factory=list)
    stopped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)  # opening, and all items
    phases: dict[str, float] = field(default_factory=dict)  # seconds of this rank in each
    background: dict[str, float] = field(default_factory=dict)

    @property
    def backend(self) -> Backend:
        """One for all, where only the kind of engine matters."""
        return self.teams[0].backend

    @property
    def plans(self) -> dict[str, Plan]:
        """Of all items that this rank's groups may do; on rank 0, of all items."""
        return {name: plan for team in self.teams for name, plan in team.plans.items()}


def run_job(make_spec: Callable[[], JobSpec], world: World) -> int:
    """Collective. Run a job; return its exit code.

    Raises
    ------
    MdattnError
        The same on all ranks, with the exit code of its class.

    """
    began = perf_counter()
    spec = together(world, "arguments", make_spec)
    job = open_job(spec, world)
    try:
        say(world, describe_plans(job))
        if not spec.dry_run:
            open_files(job)
            opened = perf_counter()
            run_items(job)
            job.seconds = {"opening": opened - began, "items": perf_counter() - opened}
        for team in job.teams:
            team.backend.close()
        return 0 if spec.dry_run else close_job(job)
    except BaseException:
        for team in job.teams:
            team.backend.abort()
        raise


def together(
    world: Group,
    phase: str,
    action: Callable[[], T],
    facts: Callable[[T], dict[str, Any]] = lambda _: {},
) -> T:
    """Collective. Do something on every rank; go on together, or raise the same error together.

    `facts` tells what all ranks must have found alike.
    """
    world.board.enter(phase)
    error: MdattnError | None = None
    found: dict[str, Any] = {}
    value: T | None = None
    try:
        value = action()
        found = facts(value)
    except Exception as failure:
        error = MdattnError.wrap(failure, rank=world.rank)
    world.agree(Step(-1, phase, digest_of(found), lambda: found), error=error)
    return value  # type: ignore[return-value]


def open_job(spec: JobSpec, world: World) -> Job:
    """Collective. Open dataset and backend; plan every item, or refuse before any work."""

    def dataset_facts(dataset: Dataset) -> dict[str, Any]:
        return {"dataset": dataset.path, "digest": dataset.digest, "bytes": dataset.size}

    dataset = together(
        world,
        "dataset",
        lambda: open_dataset(spec.data, select=spec.items, layout=spec.layout, allow=spec.allow),
        dataset_facts,
    )
    name = backend_name(spec.backend, world)
    memory = smallest(world, memory_of_a_rank(name, world)) or None
    problems = [item.problem for item in dataset.items]
    schedule = together(
        world,
        "deal",
        lambda: deal(problems, world.nodes, spec.group_size, rates=RATES[name], rank_bytes=memory),
        lambda schedule: {"group sizes": schedule.signature},
    )

    def open_one(group: Group) -> Backend:
        return open_backend(
            name, group, threads=spec.threads, transfer=spec.transfer, engine=spec.engine
        )

    teams = together(world, "backend", lambda: open_teams(world, schedule, open_one))
    job = Job(spec, world, dataset, schedule, teams)
    world.board.identify(device=job.backend.describe().get("device", ""))
    for team in teams:
        items = [dataset.items[item] for item in schedule.phases[team.phase].items]
        if team.complete:
            plan_items(job, team, items)
    return job


def plan_items(job: Job, team: Team, items: Sequence[Item]) -> None:
    """Collective in the team's group. Choose a plan for each kind of item."""

    def plan() -> dict[str, Plan]:
        team.backend.prepare([item.problem for item in items], job.spec.strategy)
        by_problem: dict[AttentionProblem, Plan] = {}
        for item in items:
            if item.problem not in by_problem:
                by_problem[item.problem] = _plan(team.backend, job.spec, item)
        return {item.name: by_problem[item.problem] for item in items}

    team.plans = together(
        team.group,
        "plan",
        plan,
        lambda plans: {"plans": digest_of({n: p.digest for n, p in plans.items()})},
    )


def _plan(backend: Backend, spec: JobSpec, item: Item) -> Plan:
    try:
        return backend.plan(item.problem, spec.strategy, lse=spec.lse)
    except RejectedError as error:
        error.item, error.file = item.name, spec.data
        raise


def describe_plans(job: Job) -> str:
    """What will be computed how, and why so: one entry a kind of item."""
    counts = Counter(job.plans.values())
    about = ", ".join(f"{name} {value}" for name, value in job.backend.describe().items())
    entries = [
        ("", f"{len(job.plans)} items of {job.spec.data} on {job.world.size} ranks"),
        ("backend", f"{job.backend.name}: {about}"),
    ]
    if job.schedule.signature != "all":
        entries += [("groups:", reason) for reason in job.schedule.reasons]
    for plan, count in counts.most_common(KINDS):
        why = plan.reasons if job.spec.dry_run else plan.reasons[:1]
        entries.append((f"{count} ×", f"{plan.problem}; {'; '.join(why)}"))
    entries += [("warning", warning) for warning in job.dataset.warnings]
    if len(counts) > KINDS:
        entries.append(("", f"and {len(counts) - KINDS} more kinds of item"))
    return "\n".join(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"mdattn: {name} " if name else "mdattn: ",
            subsequent_indent=" " * 12,
            break_long_words=False,
        )
        for name, text in entries
    )


def open_files(job: Job) -> None:
    """Collective. Make the output or open it again; find out what is still to be done."""
    spec, world, items = job.spec, job.world, job.dataset.items
    together(world, "output", lambda: _prepare_output(job) if world.rank == 0 else None)
    job.output = together(world, "open output", lambda: open_output(spec.output, writable=True))
    state = job.output.ledger.state
    left = [number for number, item in enumerate(items) if state(item) != "done"]
    job.todo = [items[number] for number in left]
    job.schedule = job.schedule.only(left)
    world.board.attach(
        run_folder(spec), world.rank, world.size, job.backend.describe().get("device", "")
    )
    open_log(run_folder(spec), world.rank)
    LOGGER.info("rank %d of %d on %s: %s", world.rank, world.size, world.hostname, sys.argv)
    for plan in dict.fromkeys(job.plans.values()):
        LOGGER.info("%s: %s", plan.problem, "; ".join(plan.reasons))
    done = len(items) - len(job.todo)
    world.board.progress(done, len(items))
    if done:
        say(world, f"mdattn: resuming: {done} of {len(items)} items are done already")


def _prepare_output(job: Job) -> None:
    """Make a new output, or make sure that the one that is there belongs to this very job."""
    spec, dataset = job.spec, job.dataset
    ranks = job.schedule.largest
    options = {
        "backend": job.backend.name,
        **spec.result_options(),
        "group_size": job.schedule.signature,
    }
    if Path(spec.output).exists() and not spec.overwrite:
        with open_output(spec.output) as output:
            output.check_resume(dataset, options, ranks=ranks, allow_change=spec.allow_change)
    else:
        create_output(
            spec.output,
            dataset.items,
            ranks=ranks,
            lse=spec.lse,
            attributes={
                **dataset.identity,
                **options,
                "ranks": ranks,
                **provenance(job.backend),
            },
            overwrite=spec.overwrite,
        )
    run_folder(spec).mkdir(exist_ok=True)


def run_folder(spec: JobSpec) -> Path:
    """Logs, summary and death note live beside the output."""
    return Path(f"{spec.output}.run")


def run_items(job: Job) -> None:
    """Collective. Compute what is to be done, phase by phase of the schedule.

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
    world, phases = job.world, len(job.teams)
    error: MdattnError | None = None
    with SharedCounter(world.comm, phases, meanwhile=shift.look_around) as counter:
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
        world.board.join(0, counted=(phases + 1) << 32)
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
        """Collective in the team's group. Do items of the team's phase until none is left."""
        job, board = self.job, self.job.world.board
        loop = Loop(
            team.group,
            team.backend,
            _files(job, self.output),
            board=board,
            deadlines=self.deadlines,
            wants_to_stop=lambda: board.stop_requested or self.limit.is_near(2 * self.slowest),
            finished=self.finished,
            failed=self.failed,
        )
        loop.run(self.tasks(team, counter))
        job.stopped = loop.stopped
        _add(job.phases, loop.clock.seconds)
        _add(job.background, {"read": loop.reads.seconds, "write": loop.writes.seconds})

    def tasks(self, team: Team, counter: SharedCounter | None) -> Iterator[Work]:
        """Items as the team takes them."""
        items, rank, board = self.job.dataset.items, team.group.rank, self.job.world.board

        def enter() -> None:
            board.enter("deal", deadline=self.deadlines.of("deal"))

        for number in team.turns(self.job.schedule, counter, enter):
            plan = team.plans[items[number].name]
            owners = partition_of(plan)
            yield Work(items[number], plan, owners.query[rank], owners.kv[rank])

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


def _files(job: Job, output: Output) -> Files:
    dataset, spec = job.dataset, job.spec

    def read(work: Work) -> Shards:
        shards = (
            dataset.read(work.item, "query", work.query),
            dataset.read(work.item, "key", work.kv),
            dataset.read(work.item, "value", work.kv),
        )
        if spec.nonfinite == "refuse":
            check_finite(shards, (work.query, work.kv, work.kv), dataset.path, work.item.name)
        return shards

    def write(work: Work) -> int:
        assert work.download is not None
        out, lse = work.download.wait()
        work.download = None  # what it holds can be used again
        checksum = output.write(work.item, work.query, out, lse if spec.lse else None)
        output.sync()
        return checksum

    def commit(work: Work, checksums: list[int]) -> None:
        shards = partition_of(work.plan).query
        output.ledger.commit(work.item, checksums, work.plan.strategy, shards)

    return Files(read, write, commit, output.ledger.fail)


def close_job(job: Job) -> int:
    """Collective. Report, and say how it ended."""
    world = job.world
    engine: dict[str, float] = {}
    for team in job.teams:
        _add(engine, team.backend.timings())
    mine = {
        "host": world.hostname,
        "device": job.backend.describe().get("device", ""),
        "seconds": rank_times(job.phases, engine),
        "background": job.background,
        "stopped": job.stopped,
        "failed": [{"item": one.item, "why": str(one)} for one in job.failed],
    }
    gathered = world.gather_bytes(json.dumps(mine).encode())
    code = 0
    if gathered is not None:
        ranks = [json.loads(part) for part in gathered]
        stopped = sum(rank.pop("stopped") for rank in ranks) > 0
        failed = {each["item"]: each for rank in ranks for each in rank.pop("failed")}
        code = 75 if stopped else 1 if failed else 0
        summary = summarize(job, ranks, list(failed.values()), code)
        path = write_summary(run_folder(job.spec), summary)
        say(world, closing_words(summary, path))
        if job.spec.json:
            print(json.dumps(summary, ensure_ascii=False))
    return int(world.bcast_bytes(str(code).encode() if world.rank == 0 else None))


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, seconds in more.items():
        sums[name] = sums.get(name, 0.0) + seconds


def say(world: World, text: str) -> None:
    """Print on rank 0."""
    if world.rank == 0:
        print(text, file=sys.stderr, flush=True)
