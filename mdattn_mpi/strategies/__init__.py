"""How a group shares one item: a generator function each, written in the verbs of a device.

``attend(device, plan, q, k, v, sinks)`` takes the rank's own shards, token-major, in the order of
the plan's partition, and the sinks ``[Nq]`` of all heads where the problem has them. What comes
before its single ``yield`` needs nothing computed (it posts transfers), so a batch runs it for item
i+1 before it enqueues item i; the rest computes. It returns ``(output, lse)`` of the rank's query
shard: ``[Sq, Nq, Hv]`` in the dtype of the query, ``[Sq, Nq]`` in float32.

All are collective and exact for any number of ranks, any lengths and any partition of the tokens.
"""

from collections.abc import Generator, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from mdattn_mpi.devices.protocol import A, AnyDevice, Device, P, T, run_to_end
from mdattn_mpi.problem import STRATEGY_NAMES, Plan, StrategyName
from mdattn_mpi.strategies.auto import choose


class Attend(Protocol):
    """What every strategy is."""

    def __call__(
        self, device: Device[A, T, P], plan: Plan, q: A, k: A, v: A, sinks: A | None = None
    ) -> Generator[None, None, tuple[A, A]]:
        """Attend with the rank's shards."""
        ...


class _Strategies(Mapping[StrategyName, Attend]):
    """All of them by name; a job imports those that it uses."""

    def __getitem__(self, name: StrategyName) -> Attend:
        if name not in STRATEGY_NAMES:
            raise KeyError(name)
        return cast(Attend, import_module(f"{__name__}.{name}").attend)

    def __iter__(self) -> Iterator[StrategyName]:
        return iter(STRATEGY_NAMES)

    def __len__(self) -> int:
        return len(STRATEGY_NAMES)


STRATEGIES: Mapping[StrategyName, Attend] = _Strategies()


def options_alone(device: AnyDevice, plan: Plan) -> dict[str, Any]:
    """Return the options of a call that no other one stands beside.

    Nothing else hides the transfers of `allgather`: so it hides behind itself.
    """
    return {"head_start": device.head_start(plan.problem)} if plan.strategy == "allgather" else {}


def attend_alone(device: AnyDevice, plan: Plan, *inputs: Any) -> tuple[Any, Any]:
    """Collective. Run a strategy to its end over arrays of the device; return output and LSE."""
    options = options_alone(device, plan)
    steps = device.perform(STRATEGIES[plan.strategy], plan, *inputs, **options)
    next(steps)
    return run_to_end(steps)


__all__ = ["STRATEGIES", "Attend", "attend_alone", "choose", "options_alone"]
