"""Execute a sharded ONNX model on several ranks, and hold it against the whole one.

The whole model runs in onnx's own reference evaluator. The sharded one runs there too, a rank a
thread, with TensorRT's operators added; and, where TensorRT is installed, as the network that its
parser makes of the file.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from mdattn_mpi.onnx.model import ATTENTION, RANK_COUNT, attribute_of, load_model, operator
from mdattn_mpi.onnx.patterns import fuse_patterns
from mdattn_mpi.onnx.shard import shard_model
from mdattn_mpi.onnx.sharding import CAUSAL_KEYS, KEYS, POSITIONS, Sharding, read_sharding
from mdattn_mpi.partition import equal_shards, shard_length
from tests.support.network_interpreter import ThreadRanks, exchange, interpret, softmax

Arrays = Mapping[str, Any]
_THREAD = threading.local()  # .ranks: the group of the rank that runs in this thread


def attend(q: Any, k: Any, v: Any, causal: str, scale: float, mask: Any = None) -> Any:
    """Attention in float64, ``[B, N, S, H]``."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    k, v = (np.repeat(array, q.shape[1] // array.shape[1], axis=1) for array in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    rows, columns = scores.shape[-2:]
    if causal != "none":
        diagonal = columns - rows if causal == "lower_right" else 0
        seen = np.arange(columns) <= np.arange(rows)[:, None] + diagonal
        assert seen.any(axis=1).all(), "a row sees no key: TensorRT divides by zero"
        scores = np.where(seen, scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return softmax(scores) @ v


class TRT_Attention(OpRun):
    """TensorRT's attention: heads first, no scale of its own."""

    op_domain = ""

    def _run(
        self, q: Any, k: Any, v: Any, mask: Any = None, causal_kind: str = "none", nb_rank: int = 1
    ) -> Any:
        if (nb_rank or 1) > 1:
            k, v = (np.concatenate(_THREAD.ranks.all_gather(array), axis=2) for array in (k, v))
        return (attend(q, k, v, causal_kind or "none", 1.0, mask).astype(q.dtype),)


class DistCollective(OpRun):
    """An exchange along dim 0."""

    op_domain = ""

    def _run(self, data: Any, collective_operation: str, nb_rank: int, **_rest: Any) -> Any:
        assert nb_rank == _THREAD.ranks.size
        return (exchange(_THREAD.ranks, data, collective_operation.upper()),)


class RingAttention(OpRun):
    """The standard operator with `nb_rank`: to the keys of all ranks."""

    op_domain = "test"

    def _run(
        self, q: Any, k: Any, v: Any, scale: float, q_num_heads: int, kv_num_heads: int
    ) -> Any:
        k, v = (np.concatenate(_THREAD.ranks.all_gather(array), axis=-2) for array in (k, v))
        if q.ndim == 4:
            return (attend(q, k, v, "none", scale or 1 / sqrt(q.shape[-1])).astype(q.dtype),)
        heads = (q_num_heads, kv_num_heads, kv_num_heads)
        split = (
            array.reshape(*array.shape[:2], count, -1).swapaxes(1, 2)
            for array, count in zip((q, k, v), heads, strict=True)
        )
        q4, k4, v4 = split
        found = attend(q4, k4, v4, "none", scale or 1 / sqrt(q4.shape[-1]))
        return (found.swapaxes(1, 2).reshape(*q.shape[:2], -1).astype(q.dtype),)


def evaluate(model: Any, inputs: Arrays) -> dict[str, Any]:
    """Run a model in onnx's reference evaluator; return its outputs by name."""
    model = _copy(model)
    for node in model.graph.node:
        if operator(node) == "Attention" and attribute_of(node, RANK_COUNT, 1) > 1:
            known = {"scale": 0.0, "q_num_heads": 0, "kv_num_heads": 0}
            given = {name: attribute_of(node, name, value) for name, value in known.items()}
            ring = onnx.helper.make_node(
                "RingAttention", node.input, node.output, domain="test", **given
            )
            node.CopyFrom(ring)
    model.opset_import.extend([onnx.helper.make_opsetid("test", 1)])
    evaluator = ReferenceEvaluator(model, new_ops=[TRT_Attention, DistCollective, RingAttention])
    wanted = {value.name for value in model.graph.input}
    given = {name: array for name, array in inputs.items() if name in wanted}
    return dict(zip(evaluator.output_names, evaluator.run(None, given), strict=True))


def _copy(model: Any) -> Any:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def attention_outputs(model: Any) -> dict[str, int]:
    """Return the tensors that the attentions of a whole model make, and their rank."""
    fused = _copy(model)
    fuse_patterns(fused)
    return {
        node.output[0]: 3 if attribute_of(node, "q_num_heads", 0) else 4
        for node in fused.graph.node
        if operator(node) in ATTENTION
    }


def showing(model: Any, tensors: Mapping[str, int], dtype: int) -> Any:
    """Copy a model, with `tensors` among its outputs."""
    copy = _copy(model)
    present = {value.name for value in copy.graph.output}
    for name, rank in tensors.items():
        if name not in present:
            copy.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, [None] * rank))
    return copy


class Comparison:
    """A model, whole and sharded, on the same inputs.

    Parameters
    ----------
    model
        The whole one.
    inputs
        Of the whole sequences, by name.
    strategy, ranks, named
        See `shard_model`.

    """

    def __init__(
        self,
        model: Any,
        inputs: Arrays,
        strategy: Any,
        ranks: int,
        named: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.inputs, self.ranks = model, inputs, ranks
        self.shown = attention_outputs(model)
        sharded, self.done = shard_model(model, strategy, ranks, named or {})
        self.sharding: Sharding = read_sharding(sharded, Path("sharded"))
        dtype = model.graph.output[0].type.tensor_type.elem_type
        self.whole = showing(model, self.shown, dtype)
        self.sharded = showing(sharded, self.shown, dtype)
        dropped = {  # padding masks
            value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim].index("S")
            for value in model.graph.input
            if value.name not in {each.name for each in sharded.graph.input}
        }
        shown = {name: rank - 2 for name, rank in self.shown.items()}
        self.axes = {**dropped, **shown, **self.sharding.axes}
        self.sequences = {
            value.name: value.type.tensor_type.shape.dim[self.axes[value.name]].dim_param
            for value in self.sharded.graph.input
            if value.name in self.axes
        }

    def tokens_of(self, sequence: str) -> int:
        """Count the tokens of a sequence, as the inputs have them."""
        (found,) = {
            self.inputs[name].shape[self.axes[name]]
            for name, own in self.sequences.items()
            if own == sequence
        }
        return int(found)

    def shard(self, name: str, rank: int, pad: bool) -> Any:
        """Cut what `rank` brings out of an input; filled up with what must not count."""
        array = self.inputs[name]
        axis = self.axes.get(name)
        if axis is None:
            return array
        span = equal_shards(array.shape[axis], self.ranks)[rank]
        own = np.take(array, np.arange(span.start, span.stop), axis)
        filler = np.full(
            [
                shard_length(array.shape[axis], self.ranks) - len(span) if i == axis else n
                for i, n in enumerate(array.shape)
            ],
            1 if np.issubdtype(array.dtype, np.integer) else 7,
            array.dtype,
        )
        return np.concatenate([own, filler], axis) if pad else own

    def numbers(self, rank: int, key_sequence: str) -> dict[str, Any]:
        """Fill in the counts of keys."""
        found = {}
        for value in self.sharded.graph.input:
            kind = self.sharding.given_by_rank(value.name)
            if kind:
                tokens = self.tokens_of(value.name[len(kind) + 1 :] or key_sequence)
                length = shard_length(tokens, self.ranks)
                own = np.arange(rank * length, (rank + 1) * length)
                values: dict[str, Any] = {KEYS: [tokens], CAUSAL_KEYS: [(rank + 1) * length]}
                values[POSITIONS] = np.minimum(own, tokens - 1)
                found[value.name] = np.array(values[kind], np.int64)
        return found

    def run(self, key_sequence: str, execute: Any) -> dict[str, Any]:
        """Run the sharded model; put the shards together."""

        def one(ranks: ThreadRanks) -> dict[str, Any]:
            _THREAD.ranks = ranks
            shards = {name: self.shard(name, ranks.rank, pad=True) for name in self.inputs}
            found: dict[str, Any] = execute(shards | self.numbers(ranks.rank, key_sequence))
            return found

        return self.joined(ThreadRanks.run(self.ranks, one))

    def joined(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Concatenate along the tokens; what has none must be the same on all ranks."""
        for name in set(parts[0]) - set(self.axes):
            for part in parts:
                np.testing.assert_array_equal(part[name], parts[0][name], name)
        return {
            name: np.concatenate([part[name] for part in parts], self.axes[name])
            if name in self.axes
            else parts[0][name]
            for name in parts[0]
        }

    def inside_each_rank(self) -> dict[str, Any]:
        """Run the whole model on every rank's own tokens alone: what a forgotten exchange gives."""
        return self.joined(
            [
                evaluate(
                    self.whole, {name: self.shard(name, rank, pad=False) for name in self.inputs}
                )
                for rank in range(self.ranks)
            ]
        )

    def execute_network(self, library: Any, folder: Path) -> Any:
        """Let TensorRT's parser make a network of the sharded file; return what executes it."""
        from mdattn_mpi.trt.library import Log
        from mdattn_mpi.trt.onnx_import import parse_model

        path = folder / "sharded.onnx"
        path.write_bytes(self.sharded.SerializeToString())
        log = Log(library)
        network, _ = parse_model(
            library, library.api.Builder(log.sink), log, load_model(path), path
        )
        collectives = {
            node.name: attribute_of(node, "collective_operation").decode().upper()
            for node in self.sharded.graph.node
            if operator(node) == "DistCollective"
        }
        names = {network.get_input(index).name for index in range(network.num_inputs)}

        def execute(given: Arrays) -> Any:
            own = {name: array for name, array in given.items() if name in names}
            return interpret(library.api, network, own, _THREAD.ranks, collectives)

        return execute

    def execute_in_onnx_runtime(self, given: Arrays) -> dict[str, Any]:
        """Run the sharded file on the rank of this thread: segments there, exchanges between.

        Attentions are computed densely, with the keys of all ranks where they say so.
        """
        from mdattn_mpi.onnx.lengths import Lengths
        from mdattn_mpi.onnx.ranks import attend as attend_to
        from mdattn_mpi.onnx.segments import Segments

        names = {value.name for value in self.sharded.graph.input}
        own = {name: np.asarray(array) for name, array in given.items() if name in names}
        shapes = Lengths(self.sharded, {name: array.shape for name, array in own.items()})
        run, answer = Segments(self.sharded, shapes.types, threads=1).run(own), None
        ranks = _THREAD.ranks
        try:
            while True:
                node, inputs = run.send(answer)
                if operator(node) == "DistCollective":
                    kind = attribute_of(node, "collective_operation").decode().upper()
                    answer = exchange(ranks, inputs[0], kind)
                    continue
                if attribute_of(node, RANK_COUNT, 1) > 1:
                    inputs[1:3] = [np.concatenate(ranks.all_gather(x), -2) for x in inputs[1:3]]
                answer = attend_to(node, *inputs)
        except StopIteration as end:
            outputs: dict[str, Any] = end.value
            return outputs

    def check(
        self, key_sequence: str = "tokens", execute: Any = None, control: bool = True
    ) -> None:
        """Assert that the sharded model is right, and that a wrong one would have shown.

        At the output of every attention the same with attention inside each rank alone must be
        wrong by ten times the sharded model's error, and by what can be seen (not without
        `control`: where a rank has no token, it can't run alone).
        """
        expected = evaluate(self.whole, self.inputs)
        found = self.run(key_sequence, execute or (lambda given: evaluate(self.sharded, given)))
        alone = self.inside_each_rank() if control else {}
        assert set(found) == set(expected)
        for name, wanted in expected.items():
            axis = self.axes.get(name)
            count = wanted.shape[axis] if axis is not None else 0
            ours = found[name] if axis is None else np.take(found[name], np.arange(count), axis)
            error = np.abs(ours.astype(float) - wanted).max(initial=0)
            assert error < 1e-4 * max(1.0, np.abs(wanted).max(initial=0)), f"{name}: {error}"
            if control and name in self.shown:
                wrong = np.abs(alone[name].astype(float) - wanted).max()
                assert wrong > max(10 * error, 0.05), f"{name}: {wrong} alone, {error} shared"
