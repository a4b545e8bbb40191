"""What many GPUs over several nodes would take, by the cost model alone; nothing is measured.

For each strategy on --ranks GPUs: the milliseconds of an item, and the share of ideal,
t(1) / (P · t(P)), alone and in a batch. GPUs are H100s or H200s with FlashAttention; those of a
node reach each other by copy engines, and each has --network of its own to other nodes.

  mdattn bench scaling
  mdattn bench scaling --lengths 1048576 --causal --network 200 --json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mdattn_mpi.bench.measure import report
from mdattn_mpi.bench.options import add_shapes, numbers, problems
from mdattn_mpi.bench.predict import LABELS, labelled, labels
from mdattn_mpi.errors import RejectedError

if TYPE_CHECKING:
    from mdattn_mpi.costs import Costs
    from mdattn_mpi.problem import AttentionProblem

SM, MULTIPROCESSORS = 9, 132  # of an H100 or H200


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare GPUs, network and shapes."""
    add = parser.add_argument
    ranks = (8, 16, 32, 64, 128)
    add("--ranks", type=numbers, default=ranks, metavar="P,P", help="default: 8,16,32,64,128")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    add("--network", type=float, default=400, metavar="GBPS", help="Gb/s a GPU (default: 400)")
    add_shapes(parser, lengths=(131072, 1 << 20), q_heads=32, causal="both")


def main(arguments: argparse.Namespace) -> int:
    """Print a row for each problem, number of GPUs and strategy that makes sense there."""
    size, network = arguments.gpus_per_node, arguments.network
    if size < 1 or network <= 0:
        raise RejectedError(
            f"{size} GPUs a node, {network:g} Gb/s", fix="give at least one, and more than 0"
        )
    if odd := [ranks for ranks in arguments.ranks if ranks > size and ranks % size]:
        raise RejectedError(
            f"{odd[0]} GPUs don't fill nodes of {size}", fix=f"give multiples of {size}"
        )
    rows = [
        row
        for problem in problems(arguments)
        for ranks in arguments.ranks
        for row in _predict(problem, ranks, _costs(ranks, size, 1e9 * network / 8))
    ]
    facts = {"nodes": f"of {size} GPUs, {network:g} Gb/s a GPU", "figures": "predicted"}
    report({"rows": rows}, list(_table(rows)), facts, as_json=arguments.json)
    return 0


def _costs(ranks: int, gpus_per_node: int, network: float) -> Costs:
    """Costs of a GPU of `ranks`; `network` in bytes/s."""
    from mdattn_mpi.costs import gpu_costs

    if ranks <= gpus_per_node:
        return gpu_costs(SM, MULTIPROCESSORS, exact_merge=True)
    costs = gpu_costs(SM, MULTIPROCESSORS, near=False, node_size=gpus_per_node, exact_merge=True)
    return replace(costs, bandwidth=network)


def _predict(problem: AttentionProblem, ranks: int, costs: Costs) -> Iterator[dict[str, Any]]:
    from mdattn_mpi.estimate import contenders, estimate

    alone = estimate(problem, 1, "ring", costs, batch=True).seconds
    for name in contenders(problem, ranks, costs):
        one, each = (estimate(problem, ranks, name, costs, batch=b) for b in (False, True))
        yield {
            **labels(problem, ranks, name),
            "seconds": one.seconds,
            "share": alone / (ranks * one.seconds),
            "batch_share": alone / (ranks * each.seconds),
            "memory": each.memory,
        }


def _table(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield [*LABELS, "share", "in a batch", "GiB a GPU"]
    for row in rows:
        yield [
            *labelled(row),
            f"{row['share']:.3f}",
            f"{row['batch_share']:.3f}",
            f"{row['memory'] / 2**30:.2f}",
        ]
