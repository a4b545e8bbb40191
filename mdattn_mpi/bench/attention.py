"""``mdattn bench attention``: one rank's engine against PyTorch's, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import geometric_mean, median
from typing import Any, NamedTuple, get_args

from mdattn_mpi.bench.measure import numbers, surroundings, table
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import AttentionProblem, Causal, DTypeName

DESCRIPTION = """\
Time our attention against PyTorch's: same hardware, same 16-bit inputs and outputs, random data,
alternating runs, medians. Results are compared before anything is timed.

  mdattn bench attention                                  one rank, all cores of this machine
  mpirun -n 2 mdattn bench attention -b cuda --lengths 8192,32768

On the CPU, a ratio above 1 means that ours is faster than scaled_dot_product_attention.
"""


class Contest(NamedTuple):
    """Two functions that compute the same attention and return the seconds that it took."""

    ours: Callable[[], float]
    theirs: Callable[[], float]


class Arena(NamedTuple):
    """Where contests take place.

    `contest` makes inputs and raises `DeviceError` if the two sides disagree; `facts` describe the
    hardware and the libraries.
    """

    contest: Callable[[AttentionProblem], Contest]
    facts: dict[str, str]


@dataclass(frozen=True)
class Result:
    """Medians in seconds; `ratio` is theirs / ours."""

    problem: AttentionProblem
    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs / self.ours


def add_parser(benchmarks: Any) -> argparse.ArgumentParser:
    """Declare the arguments."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "attention",
        help="one rank's engine against PyTorch's",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-b", "--backend", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--lengths", type=numbers, default=(2048, 8192, 16384), metavar="S,S", help="tokens")
    add("--q-heads", type=int, default=8, metavar="N", help="default: 8")
    add("--kv-heads", type=int, default=8, metavar="N", help="default: 8")
    add("--head-dim", type=numbers, default=(64, 128), metavar="H,H", help="default: 64,128")
    add("--causal", choices=("none", "upper_left", "both"), default="both", help="default: both")
    add("--dtype", choices=("bf16", "fp16", "both"), default="both", help="default: both")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")
    add("--rounds", type=int, default=5, metavar="R", help="runs of each side (default: 5)")
    add(
        "--transfer", default="auto", metavar="HOW", help="between GPUs: auto (default), copy, nccl"
    )
    add("--no-rivals", dest="rivals", action="store_false", help="GPUs: leave PyTorch out")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: argparse.Namespace) -> int:
    """Measure every combination; print a line each as it is there, and a summary."""
    if arguments.backend == "cuda":
        return _main_cuda(arguments)
    from mdattn_mpi.bench.attention_cpu import arena as open_arena

    arena = open_arena(arguments.threads)
    results = []
    for problem in problems(arguments):
        results.append(measure(arena.contest(problem), problem, arguments.rounds))
        if not arguments.json:
            print(line(results[-1]), flush=True)
    facts = {**arena.facts, **surroundings(), "rounds": str(arguments.rounds)}
    print(_as_json(results, facts) if arguments.json else _summary(results, facts))
    return 0


def _main_cuda(arguments: argparse.Namespace) -> int:
    from mdattn_mpi.lockstep import watch

    def run() -> int:
        from mdattn_mpi.bench import attention_cuda
        from mdattn_mpi.lockstep import start

        with start() as world:
            return attention_cuda.main(world, list(problems(arguments)), arguments)

    return watch(run)


def problems(arguments: argparse.Namespace) -> Iterator[AttentionProblem]:
    """All combinations of lengths, head dims, dtypes and masks."""
    short = {"bf16": "bfloat16", "fp16": "float16"}
    dtypes: Sequence[DTypeName] = (
        get_args(DTypeName) if arguments.dtype == "both" else (short[arguments.dtype],)
    )
    masks: Sequence[Causal] = (
        ("none", "upper_left") if arguments.causal == "both" else (arguments.causal,)
    )
    for length, dim, dtype, causal in product(arguments.lengths, arguments.head_dim, dtypes, masks):
        heads = (arguments.q_heads, arguments.kv_heads)
        yield AttentionProblem(length, length, *heads, dim, dim, dtype, causal)


def measure(contest: Contest, problem: AttentionProblem, rounds: int) -> Result:
    """Run both sides in turn; the first run of each doesn't count."""
    if rounds < 1:
        raise RejectedError(f"{rounds} rounds", fix="use at least one")
    times = [(contest.ours(), contest.theirs()) for _ in range(rounds + 1)][1:]
    ours, theirs = (median(side) for side in zip(*times, strict=True))
    return Result(problem, ours, theirs)


def line(result: Result) -> str:
    """Print one result in a line."""
    gflops = result.problem.flops / 1e9
    return (
        f"{result.problem}: ours {result.ours * 1e3:.1f} ms ({gflops / result.ours:.0f} GFLOP/s), "
        f"PyTorch {result.theirs * 1e3:.1f} ms ({gflops / result.theirs:.0f}), "
        f"ratio {result.ratio:.2f}"
    )


def causal_cost(results: Sequence[Result]) -> dict[str, float]:
    """Our time with a causal mask as a share of that without, for everything that has both."""
    full = {_but_mask(r.problem): r.ours for r in results if r.problem.causal == "none"}
    return {
        _but_mask(r.problem): r.ours / full[_but_mask(r.problem)]
        for r in results
        if r.problem.causal != "none" and _but_mask(r.problem) in full
    }


def _but_mask(problem: AttentionProblem) -> str:
    return f"S={problem.q_tokens} H={problem.head_dim} {problem.dtype}"


def _summary(results: Sequence[Result], facts: dict[str, str]) -> str:
    rows = [("S", "N", "H", "dtype", "mask", "ratio")] + [
        (
            str(r.problem.q_tokens),
            f"{r.problem.q_heads}/{r.problem.kv_heads}",
            str(r.problem.head_dim),
            r.problem.dtype,
            "full" if r.problem.causal == "none" else "causal",
            f"{r.ratio:.2f}",
        )
        for r in results
    ]
    costs = [f"{where}: {cost:.2f}" for where, cost in causal_cost(results).items()]
    return "\n".join(
        [
            "",
            table(rows),
            "",
            f"geometric mean of the ratios: {geometric_mean(r.ratio for r in results):.3f}",
            *(["our causal time / full time:", *(f"  {cost}" for cost in costs)] if costs else []),
            *(f"{name}: {value}" for name, value in facts.items()),
        ]
    )


def _as_json(results: Sequence[Result], facts: dict[str, str]) -> str:
    return json.dumps(
        {
            "results": [
                {**asdict(r.problem), "ours": r.ours, "theirs": r.theirs, "ratio": r.ratio}
                for r in results
            ],
            "geometric_mean": geometric_mean(r.ratio for r in results),
            "causal_cost": causal_cost(results),
            "facts": facts,
        },
        indent=1,
    )
