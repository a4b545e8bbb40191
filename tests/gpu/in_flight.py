"""The library call on arrays that are still being computed, whose results are used at once.

A producer runs for some milliseconds in the caller's stream; q, k and v are overwritten or freed as
soon as `attention` returns, the output is read, overwritten and freed; nothing waits for the GPU
before all calls have been made. Results are compared on the GPU with float64.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Any, get_args

import ml_dtypes
import numpy as np

import mdattn_mpi
from mdattn_mpi.devices.cuda.interop import StreamCaller
from mdattn_mpi.lockstep import World
from mdattn_mpi.problem import AttentionProblem, DTypeName, StrategyName

TOKENS, HEADS, DIM = 2048, 8, 128
WIDTH = 4096  # of the producer's matrices
STEPS = 40  # products of the producer: longer than a host needs for a call
SETS = 4  # different inputs
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)
Context = Callable[[], contextlib.AbstractContextManager[Any]]
Reference = Callable[..., tuple[Any, Any]]


@cache
def random(number: int) -> Any:
    """Inputs of the producer, ``[tokens, width]``."""
    return np.random.default_rng(number).standard_normal((TOKENS, WIDTH)).astype(np.float32)


@cache
def weights() -> Any:
    """The producer's matrix; it keeps the variance."""
    found = np.random.default_rng(99).standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
    return found.astype(np.float32)


class Torch:
    """PyTorch."""

    name: str = "torch"
    dtype: DTypeName = "bfloat16"

    def __init__(self, ordinal: int) -> None:
        self.torch = torch = import_module("torch")
        torch.cuda.set_device(ordinal)
        self.weights = self.array(weights()).bfloat16()
        self.sides = itertools.cycle([torch.cuda.Stream() for _ in range(2)])

    def streams(self) -> dict[str, Context]:
        """Where a call is made, by name."""
        cuda = self.torch.cuda
        return {
            "default stream": contextlib.nullcontext,
            "two streams in turn": lambda: cuda.stream(next(self.sides)),
            "a stream a call": lambda: cuda.stream(cuda.Stream()),
        }

    def array(self, values: Any) -> Any:
        """A NumPy array on the GPU."""
        return self.torch.tensor(values, device="cuda")

    def produce(self, start: Any, strided: bool) -> list[Any]:
        """Begin computing q, k and v."""
        x = start.bfloat16()
        for _ in range(STEPS):
            x = x @ self.weights
        width = HEADS * DIM
        found = [x[:, i * width : (i + 1) * width].reshape(len(x), HEADS, DIM) for i in range(3)]
        return found if strided else [array.contiguous() for array in found]

    def error(self, out: Any, right: Any) -> Any:
        """The relative error of `out`, on the GPU."""
        return (out.float() - right).norm() / right.norm().clamp(min=1e-30)

    def spoil(self, *arrays: Any) -> None:
        """Overwrite arrays, and what is free for the next one to take."""
        for array in arrays:
            array.fill_(float("nan"))
        for array in arrays:
            self.torch.full_like(array, float("nan"))

    def numbers(self, arrays: Sequence[Any]) -> Any:
        """Bring numbers to the host, once they are there."""
        self.torch.cuda.synchronize()
        return np.array([np.asarray(array.float().cpu()) for array in arrays], np.float32)


class Cupy(Torch):
    """CuPy."""

    name, dtype = "cupy", "float16"

    def __init__(self, ordinal: int) -> None:
        self.cupy = cupy = import_module("cupy")
        cupy.cuda.Device(ordinal).use()
        self.weights = self.array(weights()).astype("float16")
        self.heavy = cupy.tile(self.weights, (2, 2))
        self.scratch = cupy.empty_like(self.heavy)
        many = [cupy.cuda.Stream(non_blocking=True) for _ in range(32)]  # as PyTorch has them
        self.sides, self.many = itertools.cycle(many[:2]), itertools.cycle(many)

    def streams(self) -> dict[str, Context]:
        """Where a call is made, by name."""
        return {
            "default stream": contextlib.nullcontext,
            "two streams in turn": lambda: next(self.sides),
            "a stream a call": lambda: next(self.many),
        }

    def array(self, values: Any) -> Any:
        """A NumPy array on the GPU."""
        return self.cupy.asarray(values)

    def produce(self, start: Any, strided: bool) -> list[Any]:
        """Begin computing q, k and v."""
        # CuPy takes so long to launch the steps that, alone, they would end before the call begins.
        self.cupy.matmul(self.heavy, self.heavy, out=self.scratch)
        x = start.astype("float16")
        for _ in range(STEPS):
            x = x @ self.weights
        parts = x.reshape(len(x), WIDTH // HEADS // DIM, HEADS, DIM)
        found = [parts[:, i] for i in range(3)]
        return found if strided else [self.cupy.ascontiguousarray(array) for array in found]

    def error(self, out: Any, right: Any) -> Any:
        """The relative error of `out`, on the GPU."""
        norm = self.cupy.linalg.norm
        return norm((out.astype("float32") - right).ravel()) / norm(right.ravel()).clip(1e-30)

    def spoil(self, *arrays: Any) -> None:
        """Overwrite arrays, and what is free for the next one to take."""
        for array in arrays:
            array.fill(float("nan"))
        for array in arrays:
            self.cupy.full_like(array, float("nan"))

    def numbers(self, arrays: Sequence[Any]) -> Any:
        """Bring numbers to the host, once they are there."""
        self.cupy.cuda.Device().synchronize()
        return np.array([self.cupy.asnumpy(array) for array in arrays], np.float32)


class Jax(Torch):
    """JAX: no streams, and arrays that are freed but never overwritten."""

    name, dtype = "jax", "bfloat16"

    def __init__(self, ordinal: int) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.jax = jax = import_module("jax")
        self.gpu = jax.devices("cuda")[ordinal]
        self.weights = self.array(weights()).astype("bfloat16")
        jnp = jax.numpy

        def produce(start: Any, weights: Any) -> list[Any]:
            x = start.astype("bfloat16")
            for _ in range(STEPS):
                x = x @ weights
            return [x.reshape(len(x), WIDTH // HEADS // DIM, HEADS, DIM)[:, i] for i in range(3)]

        def error(out: Any, right: Any) -> Any:
            norm = jnp.linalg.norm
            difference = (out.astype("float32") - right).ravel()
            return norm(difference) / jnp.maximum(norm(right.ravel()), 1e-30)

        self._produce, self.error = jax.jit(produce), jax.jit(error)  # type: ignore[method-assign]
        self._spoil = jax.jit(lambda array: jnp.full_like(array, jnp.nan))

    def streams(self) -> dict[str, Context]:
        """Where a call is made, by name."""
        return {"its own streams": contextlib.nullcontext}

    def array(self, values: Any) -> Any:
        """A NumPy array on the GPU."""
        return self.jax.device_put(values, self.gpu)

    def produce(self, start: Any, strided: bool) -> list[Any]:
        """Begin computing q, k and v."""
        return list(self._produce(start, self.weights))

    def spoil(self, *arrays: Any) -> None:
        """Free arrays, and overwrite what is free for the next one to take."""
        shaped = [self._spoil(array) for array in arrays]
        del shaped

    def numbers(self, arrays: Sequence[Any]) -> Any:
        """Bring numbers to the host, once they are there."""
        return np.array([np.asarray(array).astype(np.float32) for array in arrays])


class Case:
    """One library on one rank: what it computes, and what is right.

    Parameters
    ----------
    library
        One of the above.
    shares
        How many tokens each rank holds.
    reference
        Output and LSE in float64.
    tolerance
        Of the relative error.

    """

    def __init__(
        self, world: World, library: Torch, shares: Sequence[int], reference: Reference, tol: float
    ) -> None:
        self.world, self.library, self.tolerance = world, library, tol
        ends = [0, *itertools.accumulate(shares)]
        rows = slice(ends[world.rank], ends[world.rank + 1])
        problem = AttentionProblem(
            TOKENS,
            TOKENS,
            HEADS,
            HEADS,
            DIM,
            DIM,
            library.dtype,
            "upper_left",
        )
        dtype = ml_dtypes.bfloat16 if library.dtype == "bfloat16" else np.float16
        self.starts, self.right = [], []
        for number in range(SETS):
            values = random(number)
            # Shard by shard, as each rank has them: other shapes are rounded otherwise.
            shards = [
                library.produce(library.array(values[start:stop]), False)
                for start, stop in itertools.pairwise(ends)
            ]
            whole = [
                np.concatenate([library.numbers([array])[0] for array in arrays]).astype(dtype)
                for arrays in zip(*shards, strict=True)
            ]
            right = reference(problem, *whole)[0][rows].astype(np.float32)
            self.starts.append(library.array(values[rows]))
            self.right.append(library.array(right))
        library.numbers(self.right)  # they are there, whichever stream reads them

    def wrong(
        self,
        strategy: StrategyName,
        where: Context,
        calls: int,
        *,
        shift: int = 0,
        keep: bool = False,
    ) -> int:
        """Collective. Call, and count on this rank what is wrong.

        `shift` compares with what is right for other inputs; `keep` keeps the outputs.
        """
        library, errors, kept = self.library, [], []
        for call in range(calls):
            number = call % SETS
            with where():
                arrays = library.produce(self.starts[number], strided=call % 3 == 2)
                out = mdattn_mpi.attention(
                    self.world.comm,
                    *arrays,
                    causal="upper_left",
                    strategy=strategy,
                )
                library.spoil(*arrays)
                del arrays
                errors.append(library.error(out, self.right[(number + shift) % SETS]))
                if keep:
                    kept.append(out)
                else:
                    library.spoil(out)
                del out
        return int((~(library.numbers(errors) <= self.tolerance)).sum())  # NaN is wrong


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Read what comes in without waiting for the caller's stream, as a control."""
    view = StreamCaller.view
    StreamCaller.view = lambda self, array: (view(self, array)[0], {})  # type: ignore[method-assign]
    try:
        yield
    finally:
        StreamCaller.view = view  # type: ignore[method-assign]


def check(world: World, calls: int, reference: Reference, tolerance: dict[str, float]) -> int:
    """Collective. `calls` a library, strategy and kind of streams; count what is wrong."""
    wrong = 0
    for kind in (Torch, Cupy, Jax):
        try:
            import_module(kind.name)
        except ImportError:
            if world.rank == 0:
                print(f"in flight: {kind.name} isn't installed: not tried")
            continue
        library = kind(world.local_rank)
        shares = [TOKENS // world.size] * world.size
        shares[0] += TOKENS - sum(shares)
        case = Case(world, library, shares, reference, tolerance[kind.dtype])
        wrong += _controls(world, case)
        for strategy, (name, where) in itertools.product(STRATEGIES, library.streams().items()):
            wrong += _say(
                world, f"{kind.name}, {strategy}, {name}", calls, case.wrong(strategy, where, calls)
            )
        empty = Case(world, library, [TOKENS, *[0] * (world.size - 1)], reference, case.tolerance)
        for strategy in STRATEGIES:
            found = empty.wrong(strategy, contextlib.nullcontext, SETS)
            wrong += _say(world, f"{kind.name}, {strategy}, ranks without tokens", SETS, found)
    return wrong


def _controls(world: World, case: Case) -> int:
    """Collective. Try what must come out wrong; count what doesn't.

    Outputs are kept: memory that comes back from the caller waits for the caller's stream before it
    is written, and that hides a missing wait.
    """
    name, where = next(iter(case.library.streams().items()))
    found = [("other inputs' results", case.wrong("ring", where, SETS, shift=1))]
    if case.library.name != "jax":  # which offers no way not to wait
        with without_waiting():
            found.append(("no wait for the caller", case.wrong("ring", where, 5 * SETS, keep=True)))
    blind = 0
    for control, wrong in found:
        total = sum(world.allgather(wrong))
        blind += not total
        if world.rank == 0:
            verdict = "seen" if total else "NOT SEEN: the check is blind"
            print(f"in flight: control, {case.library.name}, {control}, {name}: {verdict}")
    return blind


def _say(world: World, what: str, calls: int, wrong: int) -> int:
    """Collective. Print how many calls were wrong on any rank; return this rank's own."""
    total = max(world.allgather(wrong))
    if world.rank == 0:
        print(f"in flight: {what}: {calls} calls, {total} wrong", flush=True)
    return wrong
