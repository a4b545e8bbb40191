"""``-s auto``: which strategy fits a problem, a group and a device, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mdattn_mpi.costs import Costs
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.estimate import Estimate, contenders, estimate, least_ranks
from mdattn_mpi.problem import STRATEGY_NAMES, AttentionProblem, Partition, StrategyName
from mdattn_mpi.text import counted, duration

TIE = 1.05  # where merging costs exactness, merging less is worth this much time


def choose(
    problem: AttentionProblem,
    ranks: int,
    strategy: Literal["auto"] | StrategyName,
    costs: Costs,
    *,
    batch: bool = True,
    owners: Partition | None = None,
) -> tuple[StrategyName, tuple[str, ...]]:
    """Pick the fastest strategy that fits into memory.

    Where merging costs exactness, near ties go to the one that merges least.

    Parameters
    ----------
    strategy
        What the user asked for; any other than ``auto`` is only checked.
    costs, batch, owners
        See `estimate.estimate`.

    Returns
    -------
    tuple
        The strategy, and the reasons as sentences to print.

    Raises
    ------
    RejectedError
        No strategy, or not the one asked for, fits into `costs.memory`.

    """
    if strategy not in ("auto", *STRATEGY_NAMES):
        raise RejectedError(f"strategy {strategy!r}", fix=f"use auto, {', '.join(STRATEGY_NAMES)}")
    names = contenders(problem, ranks, costs)
    if strategy == "hierarchical":
        _check_nodes(ranks, costs.node_size)
        names = STRATEGY_NAMES
    estimates = {
        name: estimate(problem, ranks, name, costs, batch=batch, owners=owners) for name in names
    }
    fitting = {
        name: found
        for name, found in estimates.items()
        if not costs.memory or found.memory <= costs.memory
    }
    wanted = names if strategy == "auto" else (strategy,)
    if not any(name in fitting for name in wanted):
        raise _too_large(problem, min(wanted, key=lambda n: estimates[n].memory), estimates, costs)
    if strategy != "auto":
        alone = _alone(problem, estimates[strategy], ranks, costs, batch)
        return strategy, (f"{strategy}: asked for; {estimates[strategy]}{alone}",)
    if ranks == 1:
        return "ring", ("ring: one rank, nothing to exchange",)
    best = min(found.seconds for found in fitting.values())
    least_merged: tuple[StrategyName, ...] = ("allgather", "ulysses", "hierarchical", "ring")
    worth = 1.0 if costs.exact_merge else TIE
    chosen = next(n for n in least_merged if n in fitting and fitting[n].seconds <= worth * best)
    alone = _alone(problem, fitting[chosen], ranks, costs, batch)
    ordered = sorted(estimates, key=lambda name: (name != chosen, estimates[name].seconds))
    return chosen, tuple(
        f"{name}: {'chosen; ' if name == chosen else ''}"
        f"{'does not fit; ' if name not in fitting else ''}estimated {estimates[name]}"
        f"{alone if name == chosen else ''}"
        for name in ordered
    )


def _check_nodes(ranks: int, node_size: int) -> None:
    if node_size == 1 or ranks == node_size or ranks % node_size:
        raise RejectedError(
            f"strategy 'hierarchical' needs several nodes of as many ranks each, node after node, "
            f"and this group of {counted(ranks, 'rank')} isn't cut so",
            fix="start as many ranks on every node, with --map-by ppr:N:node in Open MPI or "
            "--ntasks-per-node=N --distribution=block in Slurm; or use -s ring or -s auto",
        )


def _alone(
    problem: AttentionProblem, shared: Estimate, ranks: int, costs: Costs, batch: bool
) -> str:
    """Say so if one rank would be faster than all: who calls the library might let it."""
    alone = estimate(problem, 1, "ring", costs, batch=batch)
    fits = not costs.memory or alone.memory <= costs.memory
    if ranks == 1 or not fits or alone.seconds >= shared.seconds:
        return ""
    return f"; one rank alone would take {duration(alone.seconds)}"


def _too_large(
    problem: AttentionProblem,
    least: StrategyName,
    estimates: Mapping[StrategyName, Estimate],
    costs: Costs,
) -> RejectedError:
    fits = next((name for name in estimates if estimates[name].memory <= costs.memory), None)
    enough = least_ranks(problem, costs)
    if fits:
        fix = f"use -s {fits}, which fits"
    elif enough:
        fix = f"start at least {enough} ranks"
    else:
        fix = "no number of ranks is enough: use devices with more memory"
    return RejectedError(
        f"{problem} takes {estimates[least].memory / 2**30:.3g} GiB a rank with {least}, "
        f"of {costs.memory / 2**30:.3g} GiB",
        fix=fix,
    )
