"""Both kinds of work through the real loop and real files, on a group of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import h5py
import ml_dtypes
import numpy as np
import pytest

from mdattn_mpi.dataset import AnyItem, ModelItem, Output, create_output, open_dataset, open_output
from mdattn_mpi.dataset.hdf5 import File
from mdattn_mpi.dataset.named import open_tensors
from mdattn_mpi.dataset.tensors import TensorFile
from mdattn_mpi.errors import ItemError
from mdattn_mpi.lockstep import Board, Deadlines
from mdattn_mpi.problem import AttentionProblem, ModelPlan, Plan, Span, TensorSpec
from mdattn_mpi.runner.attention import Attention
from mdattn_mpi.runner.batch import files_of
from mdattn_mpi.runner.events import Events
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.loop import Loop
from mdattn_mpi.runner.model import ModelWork
from mdattn_mpi.runner.work import Kind
from tests.support.finished import attention, random_inputs, write_dataset
from tests.unit.runner.test_loop import Alone

Arrays = Sequence[Any]
LENGTHS = (13, 7, 21, 1, 16)
DIM = 6

INPUTS = (TensorSpec("input_ids", (-1,), "int64"), TensorSpec("hidden", (1, -1, DIM), "float32", 1))
OUTPUTS = (
    TensorSpec("last_hidden_state", (-1, DIM), "float16"),
    TensorSpec("embedding", (DIM,), "float32", None),
    TensorSpec("logprobs", (-1,), "float32"),
)


def model(ids: Any, hidden: Any) -> Arrays:
    """Something of every output's shape that depends on every token."""
    weights = (ids[:, None] % 7).astype(np.float32)
    states = hidden[0] * weights + np.cumsum(hidden[0], axis=0)
    return states.astype(np.float16), states.sum(axis=0), np.abs(states).max(axis=1)


class Executor:
    """Computes with NumPy what it was given; `compute` gets the arrays and the plan's problem."""

    name = "numpy"

    def __init__(self, compute: Callable[..., Arrays]) -> None:
        self._compute = compute

    def host_empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.full(shape, 77, dtype)

    def begin(self, plan: Any, *shards: Any) -> Any:
        return plan.problem, shards

    def enqueue(self, running: Any) -> None: ...

    def collect(self, running: Any) -> Any:
        problem, shards = running
        return SimpleNamespace(wait=lambda: self._compute(problem, *shards))


class Case:
    """A kind of work with its files."""

    def __init__(
        self,
        kind: Kind,
        data: TensorFile,
        items: Sequence[AnyItem],
        plan: Callable[[Any], Any],
        compute: Callable[..., Arrays],
    ) -> None:
        self.kind, self.data, self.items = kind, data, items
        self.plan, self.compute = plan, compute

    def run(self, folder: Path, compute: Callable[..., Arrays] | None = None) -> Output:
        """Run all items; the output that came of it."""
        create_output(folder / "out.h5", self.items, ranks=1, lse=True, overwrite=True)
        output = open_output(folder / "out.h5", writable=True)
        self.told: list[ItemError] = []
        job = cast(Any, SimpleNamespace(dataset=self.data, kind=self.kind))
        loop = Loop(
            cast(Any, Alone()),
            cast(Any, Executor(compute or self.compute)),
            files_of(job, output, Events()),
            board=Board(),
            deadlines=Deadlines(),
            wants_to_stop=lambda: False,
            finished=lambda task: None,
            failed=lambda item, error: self.told.append(error),
        )
        loop.run(self.kind.task(item, self.plan(item.problem), 0) for item in self.items)
        return output

    def inputs(self, item: AnyItem) -> Arrays:
        task = self.kind.task(item, self.plan(item.problem), 0)
        return [
            self.data.read(item, s.tensor.name, s.spans, out=np.empty(s.shape, s.dtype))
            for s in task.reads
        ]


def attention_case(folder: Path) -> Case:
    problems = {
        f"i{n}": AttentionProblem(tokens, tokens + 3, 4, 2, 8, 10, causal="lower_right")
        for n, tokens in enumerate(LENGTHS)
    }
    seed = np.random.SeedSequence().entropy
    write_dataset(
        folder / "data.h5",
        {name: (p, random_inputs(p, hash((seed, name)) % 2**31)) for name, p in problems.items()},
    )
    data = open_dataset(folder / "data.h5")
    spec = JobSpec(str(folder / "data.h5"), str(folder / "out.h5"), lse=True)

    def compute(problem: Any, *shards: Any) -> Arrays:
        out, lse = attention(problem, *shards)
        return out.astype(ml_dtypes.bfloat16), lse.astype(np.float32)

    def plan(problem: Any) -> Plan:
        return Plan(problem, "ring", 1, lse=True)

    return Case(Attention(spec, data), data, data.items, plan, compute)


def model_case(folder: Path) -> Case:
    random = np.random.default_rng()
    with h5py.File(folder / "data.h5", "w") as file:
        for n, tokens in enumerate(LENGTHS):
            file[f"items/i{n}/input_ids"] = random.integers(0, 1 << 40, tokens)
            file[f"items/i{n}/hidden"] = random.standard_normal((1, tokens, DIM), np.float32)
    spec = JobSpec(str(folder / "data.h5"), str(folder / "out.h5"), engine="e", bind=("b",))
    kind = ModelWork(spec, INPUTS, OUTPUTS, {}, "0")
    data = open_tensors(File(folder / "data.h5"), INPUTS, kind.problem)

    def plan(problem: Any) -> ModelPlan:
        return ModelPlan(problem, "allgather", 1, "0")

    return Case(kind, data, data.items, plan, lambda _, *arrays: model(*arrays))


CASES = {"attention": attention_case, "model": model_case}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return CASES[request.param](tmp_path)


def errors(case: Case, output: Output) -> dict[str, list[float]]:
    """The largest error of each tensor of each item that is done."""
    found = {}
    for item in case.items:
        if output.ledger.state(item) == "done":
            expected = case.compute(item.problem, *case.inputs(item))
            tensors = [each.name for each in outputs(item)]
            found[item.name] = [
                float(np.abs(output.read(item, name).astype(float) - want.astype(float)).max())
                for name, want in zip(tensors, expected, strict=True)
            ]
    return found


def outputs(item: AnyItem) -> Sequence[TensorSpec]:
    return OUTPUTS if isinstance(item, ModelItem) else item.problem.outputs(lse=True)


def test_what_is_in_the_file_is_what_was_computed(case: Case, tmp_path: Path) -> None:
    output = case.run(tmp_path)
    found = errors(case, output)
    assert list(found) == [item.name for item in case.items]
    assert not np.any([value for each in found.values() for value in each])
    for item in open_output(output.path).items:
        assert item.problem == case.items[item.index].problem
        assert output.damaged(item) == ()


def test_a_computation_that_gives_zeros_is_noticed(case: Case, tmp_path: Path) -> None:
    def zeros(problem: Any, *shards: Any) -> Arrays:
        return [np.zeros_like(array) for array in case.compute(problem, *shards)]

    found = errors(case, case.run(tmp_path, zeros))
    assert all(value > 0.01 for each in found.values() for value in each)


@pytest.mark.parametrize("bad", [0, 2, 4])
def test_an_item_that_holds_nan_fails_alone(bad: int, case: Case, tmp_path: Path) -> None:
    name, read = ("hidden" if isinstance(case.kind, ModelWork) else "value"), case.data.read

    def poisoned(item: Any, tensor: str, spans: Any, *, out: Any) -> Any:
        read(item, tensor, spans, out=out)
        if (item.name, tensor) == (f"i{bad}", name):
            out.reshape(-1)[-1] = np.nan
        return out

    case.data.read = poisoned  # type: ignore[method-assign,assignment]
    output = case.run(tmp_path)
    states = [output.ledger.state(item) for item in case.items]
    assert states == ["failed" if n == bad else "done" for n in range(len(LENGTHS))]
    assert [error.item for error in case.told] == [f"i{bad}"]
    assert name in str(case.told[0])
    assert "--nonfinite pass" in str(case.told[0])


def test_an_item_that_comes_out_as_nan_fails_alone(case: Case, tmp_path: Path) -> None:
    def spoiled(problem: Any, *shards: Any) -> Arrays:
        arrays = case.compute(problem, *shards)
        if problem == case.items[1].problem:
            arrays[0].reshape(-1)[3] = np.nan
        return arrays

    output = case.run(tmp_path, spoiled)
    states = [output.ledger.state(item) for item in case.items]
    assert states == ["failed" if n == 1 else "done" for n in range(len(LENGTHS))]
    assert [error.item for error in case.told] == ["i1"]
    assert "holds nan" in str(case.told[0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_the_ranks_shards_of_a_model_make_the_whole(ranks: int, tmp_path: Path) -> None:
    """Also with fewer tokens than ranks; what has no token dim is the first rank's."""
    case = model_case(tmp_path)
    for item in case.items:
        assert isinstance(item, ModelItem)
        tokens, plan = item.problem.tokens, replace(case.plan(item.problem), ranks=ranks)
        tasks = [case.kind.task(item, plan, rank) for rank in range(ranks)]
        for task in tasks:
            assert task.tokens == tuple(shard.reads[0].spans for shard in tasks)
            assert [shard.tensor.shape for shard in task.reads] == [(tokens,), (1, tokens, DIM)]
            count = len(task.reads[0].spans[0])
            assert [shard.shape for shard in task.writes] == [(count, DIM), (DIM,), (count,)]
        every = [n for task in tasks for s in task.reads[0].spans for n in range(s.start, s.stop)]
        assert every == list(range(tokens))
        assert [task.writes[1].here for task in tasks] == [True] + [False] * (ranks - 1)


def test_a_span_of_ids_is_read_in_place(tmp_path: Path) -> None:
    case = model_case(tmp_path)
    with h5py.File(tmp_path / "data.h5") as file:
        ids, hidden = file["items/i2/input_ids"][:], file["items/i2/hidden"][:]
    spans = (Span(15, 20), Span(2, 4))
    taken = np.r_[15:20, 2:4]
    room = np.empty(7, np.int64)
    assert np.array_equal(case.data.read(case.items[2], "input_ids", spans, out=room), ids[taken])
    found = case.data.read(case.items[2], "hidden", spans, out=np.empty((1, 7, DIM), np.float32))
    assert np.array_equal(found, hidden[:, taken])


def test_padding_is_refused(tmp_path: Path) -> None:
    """By the item that holds it, and by no other."""
    case = model_case(tmp_path)
    kind, item = case.kind, case.items[0]
    assert isinstance(kind, ModelWork)
    task = kind.task(item, case.plan(item.problem), 0)
    ids, hidden = case.inputs(item)
    kind.paddings = {"input_ids": int(ids[1]) + 1}
    kind.check(task, [ids, hidden])
    kind.paddings = {"input_ids": int(ids[1])}
    with pytest.raises(ItemError, match=rf"input_ids holds {ids[1]}, which is padding") as refused:
        kind.check(task, [ids, hidden])
    assert refused.value.item == item.name
