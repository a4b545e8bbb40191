"""``mdattn bench attention -b cuda``, under ``mpirun -n P``: P GPUs against one, and PyTorch's.

In every round each side has its turn, beginning with another one each time, after the same pause:
without it, whoever comes after a pause finds a cooler GPU and higher clocks. A call's time is that
from the end of the one before it to its own end, by events on the GPU, the median over calls and
rounds. For "one GPU" every GPU computes the whole item by itself, all at the same time. Of several
ranks the slowest counts, on all sides alike: GPUs of one node differ by some percent. Inputs are
random and rotate. All sides but PyTorch's attend with the same kernel; what ``-s auto`` would take
for a lone item is marked. A call of a lone item starts its transfers when the call before it has
ended; in a stream of items they run while the item before computes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import report, table, versions
from mdattn_mpi.bench.rivals import FLEX, THEIRS, Rivals
from mdattn_mpi.devices.protocol import run_to_end
from mdattn_mpi.estimate import estimate
from mdattn_mpi.partition import partition, partition_of
from mdattn_mpi.problem import AttentionProblem, Plan, Span, StrategyName
from mdattn_mpi.text import show

if TYPE_CHECKING:
    from mdattn_mpi.devices.cuda.device import CudaDevice
    from mdattn_mpi.lockstep import World

SETS = 3  # inputs that rotate
ROWS = 32  # of a rank's query that are compared with float64
SECONDS = 0.15  # of one turn, roughly
PAUSE = 0.2  # seconds before a turn
ONE = "one GPU"
STREAM = "stream of allgather"

Shards = tuple[Any, Any, Any]


@dataclass
class Side:
    """One of the sides that are compared: ``run(n)`` gives the milliseconds of n calls."""

    name: str
    run: Callable[[int], list[float]]
    error: float = float("nan")
    host: list[float] = field(default_factory=list)  # milliseconds of the host, a call
    times: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        """The median call."""
        return median(self.times) if self.times else float("nan")


def main(world: World, problems: Sequence[AttentionProblem], arguments: argparse.Namespace) -> None:
    """Collective. Measure every problem; rank 0 prints."""
    from mdattn_mpi.devices.cuda.open import open_cuda

    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = open_cuda(
        world,
        transfer=arguments.transfer,
        kernel=arguments.kernel,
        timings=False,
        replays=arguments.replays,
    )
    rivals = Rivals(world) if arguments.rivals else None
    results = []
    for problem in problems:
        sides = measure(world, device, problem, arguments.rounds, rivals)
        kernel, auto = device.check(problem)[0], taken_by_auto(device, problem)
        if world.rank == 0:
            found = {**asdict(problem), "kernel": kernel, "auto": auto, "sides": sides}
            results.append(found)
            if not arguments.json:
                show(_lines(problem, found, world.size))
    facts = {**device.describe(), **versions("torch"), "rounds": str(arguments.rounds)}
    if rivals:
        rivals.close()
    device.close()
    if world.rank == 0:
        figures = {"ranks": world.size, "results": results}
        report(figures, (), facts, as_json=arguments.json)


def taken_by_auto(device: CudaDevice, problem: AttentionProblem) -> str:
    """Return the side that ``-s auto`` takes for an item that stands alone."""
    from mdattn_mpi.strategies import choose

    if device.ranks == 1:
        return ONE
    name, _ = choose(problem, device.ranks, "auto", device.costs(problem), batch=False)
    early = name == "allgather" and device.head_start(problem)
    return f"{name}, head start" if early else name


def measure(
    world: World,
    device: CudaDevice,
    problem: AttentionProblem,
    rounds: int,
    rivals: Rivals | None,
) -> dict[str, dict[str, Any]]:
    """Collective. Time all sides in turn; milliseconds and errors by name."""
    import torch

    inputs = Inputs(problem, seed=17)
    sides = list(our_sides(world, device, problem, inputs))
    if rivals is not None:
        theirs = rivals.runners(problem, inputs.sets)
        sides += [Side(name, run) for name, run in theirs.items()]
    expected = estimate(problem, world.size, "ring", device.costs(problem), batch=False).seconds
    for turn in range(rounds * len(sides)):
        lap, place = divmod(turn, len(sides))
        side = sides[(lap + place) % len(sides)]
        torch.cuda.synchronize()
        world.barrier()
        pause()
        world.barrier()
        calls = max(2, min(40, int(SECONDS / expected)))
        side.times += side.run(calls)
    own = {
        side.name: {
            "ms": side.milliseconds,
            "error": side.error,
            "host ms": median(side.host) if side.host else float("nan"),
        }
        for side in sides
    }
    every = world.allgather(own)
    return {
        name: {
            **{kind: max(each[name][kind] for each in every) for kind in kinds},
            "ms of ranks": [each[name]["ms"] for each in every],
        }
        for name, kinds in every[0].items()
    }


def pause() -> None:
    """Let the GPU idle, and not the host: a thread that has slept gets its core back cold."""
    end = time.perf_counter() + PAUSE
    while time.perf_counter() < end:
        pass


class Inputs:
    """Random inputs, the same on all ranks, and what is right for some of their rows."""

    def __init__(self, problem: AttentionProblem, seed: int) -> None:
        import torch

        self.problem = problem
        torch.manual_seed(seed)
        dtype = getattr(torch, problem.dtype)
        q = (problem.q_tokens, problem.q_heads, problem.head_dim)
        k = (problem.kv_tokens, problem.kv_heads, problem.head_dim)
        v = (problem.kv_tokens, problem.kv_heads, problem.v_head_dim)
        self.sets = [
            tuple(torch.randn(*shape, device="cuda", dtype=dtype) for shape in (q, k, v))
            for _ in range(SETS if problem.q_tokens <= 1 << 17 else 1)
        ]

    def shards(self, plan: Plan, rank: int) -> list[Shards]:
        """The shards of a rank, by PyTorch, one a set."""
        import torch

        owners = partition_of(plan)
        spans = (owners.query[rank], owners.kv[rank], owners.kv[rank])
        return [
            tuple(
                torch.cat([array[span.slice] for span in own]).contiguous()
                for array, own in zip(arrays, spans, strict=True)
            )
            for arrays in self.sets
        ]

    def error(self, output: Any, spans: Sequence[Span], among: Sequence[Span]) -> float:
        """Mean of ‖output − right‖ / ‖right‖ over some rows of set 0.

        `output` holds the rows of `spans`; those that are looked at are among the rows of `among`.
        """
        import torch

        q, k, v = self.sets[0]
        tokens, wanted = (
            torch.cat([torch.arange(span.start, span.stop) for span in some])
            for some in (spans, among)
        )
        rows = wanted[torch.linspace(0, len(wanted) - 1, ROWS).long()]
        local = torch.stack([(tokens == row).nonzero()[0, 0] for row in rows]).to(output.device)
        rows, group = rows.to(q.device), self.problem.group_heads
        low, high = self.problem.mask.low, self.problem.mask.high
        after = torch.arange(len(k), device=q.device)[None] - rows[:, None]
        errors = []
        for head in range(self.problem.q_heads):
            scores = q[rows, head].double() @ k[:, head // group].double().T * self.problem.scale
            if high is not None:
                scores[after > high] = -torch.inf
            if low is not None:
                scores[after < low] = -torch.inf
            right = scores.softmax(-1) @ v[:, head // group].double()
            wrong = output[local, head].double() - right
            errors.append((wrong.norm(dim=-1) / right.norm(dim=-1)).mean())
        return float(torch.stack(errors).mean())


def our_sides(
    world: World, device: CudaDevice, problem: AttentionProblem, inputs: Inputs
) -> Iterator[Side]:
    """One GPU by itself, then the strategies for lone items and in a stream."""
    import torch

    from mdattn_mpi.strategies import STRATEGIES

    def side(name: str, strategy: StrategyName, *, ahead: bool = False, **options: Any) -> Side:
        plan = Plan(problem, strategy, world.size)
        own = partition_of(plan).query[world.rank]
        arrays = [
            [device.adopt(array) for array in shards] for shards in inputs.shards(plan, world.rank)
        ]

        def begin(call: int) -> Any:
            shards = arrays[call % len(arrays)]
            steps = device.perform(STRATEGIES[strategy], plan, *shards, ahead=ahead, **options)
            next(steps)
            return steps

        def end(steps: Any) -> Any:
            return run_to_end(steps)[0]

        def run(calls: int) -> list[float]:
            marks, running, took = [], begin(0), 0.0
            for call in range(1, calls + 2):
                asked = time.perf_counter()
                following = begin(call) if ahead else None
                end(running)
                took += time.perf_counter() - asked
                marks.append(device.mark())
                asked = time.perf_counter()
                running = following or begin(call)
                took += time.perf_counter() - asked
            end(running)
            device.mark().sync()
            found.host.append(1e3 * took / (calls + 1))
            return [later - earlier for earlier, later in pairwise(marks[1:])]

        for call in range(4 * SETS):  # of the same arrays: recorded, then replayed
            output = end(begin(call))
        output = torch.from_dlpack(device.export(end(begin(0))))
        found = Side(name, run, inputs.error(output, own, own))
        return found

    yield _alone(world, device, problem, inputs)
    if world.size > 1:
        yield side("ring", "ring")
        yield side("allgather", "allgather")
        yield side("allgather, head start", "allgather", head_start=device.head_start(problem))
        yield side("ulysses", "ulysses")
        yield side(STREAM, "allgather", ahead=True)


def _alone(world: World, device: CudaDevice, problem: AttentionProblem, inputs: Inputs) -> Side:
    """Every rank's GPU computes the whole item by itself."""
    import torch

    arrays = [[device.adopt(array) for array in arrays] for arrays in inputs.sets]
    sequence = Span(0, problem.q_tokens)

    def call(index: int) -> Any:
        from mdattn_mpi.partition import blocks

        q, k, v = arrays[index % len(arrays)]
        accumulator = device.accumulator(q, problem.v_head_dim, problem.scale, problem.softcap)
        keys = Span(0, problem.kv_tokens)
        device.attend(accumulator, blocks((sequence,), (keys,), problem.mask), k, v)
        return device.finish(accumulator)[0]

    def run(calls: int) -> list[float]:
        marks = []
        for index in range(calls + 2):
            call(index)
            marks.append(device.mark())
        marks[-1].sync()
        return [later - earlier for earlier, later in pairwise(marks[1:])]

    output = torch.from_dlpack(device.export(call(0)))
    own = partition(problem, "ring", world.size).query[world.rank]
    return Side(ONE, run, inputs.error(output, (sequence,), own))


def _lines(problem: AttentionProblem, result: dict[str, Any], ranks: int) -> str:
    """A table of one problem: milliseconds, share of ideal, against PyTorch's best, error."""
    sides: dict[str, dict[str, Any]] = result["sides"]
    one = sides[ONE]
    theirs = min((sides[name]["ms"] for name in THEIRS if name in sides), default=float("nan"))
    rows = [
        ("", "ms", "of ranks", "host ms", "share of ideal", "PyTorch's / it", "error", "/ one GPU")
    ]
    for name, found in sides.items():
        rows.append(
            (
                f"auto: {name}" if name == result["auto"] else name,
                f"{found['ms']:.3f}",
                " ".join(f"{ms:.3f}" for ms in found["ms of ranks"]),
                f"{found['host ms']:.3f}",
                f"{one['ms'] / found['ms'] / (1 if name in (ONE, FLEX) else ranks):.3f}",
                f"{theirs / found['ms']:.2f}",
                f"{found['error']:.2e}",
                f"{found['error'] / one['error']:.3f}",
            )
        )
    return "\n".join([str(problem), result["kernel"], *table(rows), ""])
