"""Share an ONNX model by tokens: mark its attentions, or put collectives around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.model import (
    ATTENTION,
    RANK_COUNT,
    attribute_of,
    graph_inputs,
    import_onnx,
    name_of,
    write_sharding,
)
from mdattn_mpi.onnx.patterns import fuse_patterns
from mdattn_mpi.onnx.tokens import Shape, Tokens, token_axes
from mdattn_mpi.problem import StrategyName
from mdattn_mpi.trt.spec import Sharding

# Inputs that tell how many of the collected keys count: all of the sequence's; or, where a mask is
# aligned with the last row of a rank's buffer, those up to there.
KEYS, CAUSAL_KEYS = "keys", "causal_keys"
OLDEST = 13  # the opset since which Slice and Reshape are as they are used here
EXTRA_INPUTS = {3: "a mask", 4: "past keys", 5: "past values"}


def shard_model(
    model: Any, strategy: StrategyName, ranks: int, named_axes: Mapping[str, int]
) -> tuple[Any, list[str]]:
    """Make a model that `ranks` ranks run together, each on its own tokens.

    Parameters
    ----------
    model
        As `model.load_model` reads it; it is left as it is.
    strategy, ranks
        How to share.
    named_axes
        The dim that counts tokens, by input; empty to find it.

    Returns
    -------
    The sharded model, and what was done, a line an attention.

    Raises
    ------
    RejectedError
        No attention, one that can't be shared this way, or a node that mixes tokens.

    """
    sharded = import_onnx().ModelProto()
    sharded.CopyFrom(model)
    done = fuse_patterns(sharded)
    sites = [node for node in sharded.graph.node if node.op_type in ATTENTION]
    if not sites:
        raise RejectedError(
            "the model has no attention: no Attention or TRT_Attention node, and no "
            "MatMul–Softmax–MatMul",
            fix="export it with scaled dot-product attention (opset 23 has the operator)",
        )
    axes = token_axes(sharded, [node.input[0] for node in sites], named_axes)
    tokens = Tokens(sharded, axes)
    tokens.check(ignore=ATTENTION)
    for value in sharded.graph.output:
        axis = tokens.axis(value.name)
        if axis is not None:
            axes[value.name] = axis
    done += _share(sharded, tokens, strategy, ranks)
    _free_token_dims(sharded, axes)
    write_sharding(sharded, Sharding(strategy, ranks, axes))
    return sharded, done


def _share(model: Any, tokens: Tokens, strategy: StrategyName, ranks: int) -> list[str]:
    """Rewrite every attention whose keys are cut into shards; the others see all they need."""
    nodes: list[Any] = []
    done: list[str] = []
    numbers: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type in ATTENTION and tokens.axis(node.input[1]) is not None:
            site = Site(node, tokens, ranks)
            done.append(site.share(strategy))
            nodes += [*site.before, node, *site.after]
            model.graph.initializer.extend(site.constants)
            numbers.update(dict.fromkeys(site.numbers))
        else:
            nodes.append(node)
    if not done:
        raise RejectedError(
            "no attention of this model has keys that are cut into token shards",
            fix="name the inputs that are: --shard INPUT:DIM",
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if numbers:
        _add_numbers(model, list(numbers))
    return done


def _add_numbers(model: Any, names: Sequence[str]) -> None:
    """Add inputs of one number each."""
    onnx = import_onnx()
    opset = next((each.version for each in model.opset_import if each.domain == ""), 0)
    if opset < OLDEST:
        raise RejectedError(
            f"the model uses opset {opset}; {OLDEST} is needed",
            fix="convert it with onnx.version_converter",
        )
    for name in names:
        if name in [value.name for value in model.graph.input]:
            raise RejectedError(f"the model has an input {name!r} already", fix="rename it")
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1])
        model.graph.input.append(value)


def _free_token_dims(model: Any, axes: Mapping[str, int]) -> None:
    """Let the token dims of inputs and outputs be any; shapes in between are TensorRT's job."""
    del model.graph.value_info[:]
    for value in (*graph_inputs(model), *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.name in axes and axes[value.name] < len(dims):
            dims[axes[value.name]].dim_param = "tokens"


class Site:
    """One attention node, about to be shared.

    Parameters
    ----------
    node
        ``Attention`` or ``TRT_Attention``; it is changed.
    tokens
        Where the tokens are in the model.
    ranks
        How many share it.

    """

    def __init__(self, node: Any, tokens: Tokens, ranks: int) -> None:
        self.node = node
        self.ranks = ranks
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.constants: list[Any] = []
        self.numbers: list[str] = []  # the inputs of one number that its nodes read
        self._shown = name_of(node)
        self._prefix = f"{node.name or node.output[0]}_mdattn"
        self._output = node.output[0]
        self._onnx = import_onnx()
        self._check_inputs()
        self._shapes = tuple(self._shape(tokens, name) for name in node.input[:3])
        self._dtype = tokens.dtype(node.input[0])
        self._heads = tuple(self._count_heads(number) for number in range(3))

    def _check_inputs(self) -> None:
        extra = [number for number, name in enumerate(self.node.input) if name and number > 2]
        if extra:
            told = EXTRA_INPUTS.get(extra[0], "more inputs than three")
            raise self._refuse(f"has {told}", "use a model without, or one rank")
        if len([name for name in self.node.output if name]) > 1:
            raise self._refuse("gives more than its output", "use one rank")

    def _shape(self, tokens: Tokens, name: str) -> Shape:
        shape, axis = tokens.shape(name), tokens.axis(name)
        if shape is None or len(shape) not in (3, 4) or axis != len(shape) - 2:
            raise self._refuse(f"takes {name!r}, in which dim {axis} of {shape} counts tokens")
        return shape

    def _count_heads(self, number: int) -> int:
        if len(self._shapes[number]) == 4:
            return self._shapes[number][1]
        heads = int(attribute_of(self.node, "kv_num_heads" if number else "q_num_heads", 0))
        if heads < 1:
            raise self._refuse("doesn't tell its number of heads", "export it with *_num_heads")
        return heads

    def _refuse(self, why: str, fix: str = "") -> RejectedError:
        return RejectedError(
            f"{self._shown} {why}", fix=fix or "shard the attention block alone, or use one rank"
        )

    @property
    def _causal(self) -> bool:
        """Whether a query sees no key behind its own position."""
        kind = attribute_of(self.node, "causal_kind", b"none")
        return bool(attribute_of(self.node, "is_causal", 0)) or kind != b"none"

    @property
    def _head_dim(self) -> int:
        last = self._shapes[0][-1]
        return last if len(self._shapes[0]) == 4 else last // self._heads[0]

    def share(self, strategy: StrategyName) -> str:
        """Rewrite the node; return what was done.

        Raises
        ------
        RejectedError
            The strategy can't; naming the node and one that can.

        """
        if strategy == "ring":
            self._ring()
            return f"{self._shown}: {RANK_COUNT} = {self.ranks}"
        joined = len(self._shapes[0]) == 3
        if joined:
            self._split_heads()
        if strategy == "allgather":
            self._allgather()
            done = f"keys and values gathered from {self.ranks} ranks"
        else:
            self._ulysses()
            done = f"heads traded for tokens among {self.ranks} ranks"
        if joined:
            self._join_heads()
        if self.after:  # the rest of the model reads what comes last
            self.node.output[0] = f"{self._prefix}_inner"
            self.after[-1].output[0] = self._output
        return f"{self._shown}: {done}"

    def _ring(self) -> None:
        if self._causal and self.ranks > 1:
            raise self._refuse(
                "is causal: TensorRT's multi-device attention has no mask",
                "use -s allgather or -s ulysses",
            )
        self._set(RANK_COUNT, self.ranks)

    def _split_heads(self) -> None:
        """``[B, S, N·H]`` to ``[B, N, S, H]``."""
        for number, name in enumerate(self.node.input[:3]):
            split = self._reshape(name, (0, 0, self._heads[number], -1))
            self.node.input[number] = self._transpose(split, (0, 2, 1, 3))
        self._unset("q_num_heads", "kv_num_heads")

    def _join_heads(self) -> None:
        """``[B, N, S, H]`` to ``[B, S, N·H]``, behind the node."""
        turned = self._transpose(self._result, (0, 2, 1, 3), self.after)
        self._reshape(turned, (0, 0, -1), self.after)

    def _allgather(self) -> None:
        """Collect keys and values; under a mask a rank's keys end with its own last token."""
        keys = CAUSAL_KEYS if self._causal else KEYS
        for number in (1, 2):
            tokens_first = self._transpose(self.node.input[number], (2, 0, 1, 3))
            gathered = self._collective(tokens_first, "all_gather")
            seen = self._first(keys, gathered, 0)
            self.node.input[number] = self._transpose(seen, (1, 2, 0, 3))
        if self._causal:
            self._make_trt_attention()
            self._set("causal_kind", "lower_right")

    def _make_trt_attention(self) -> None:
        """Take the operator that alone has ``lower_right``, and that has no scale."""
        if self.node.op_type == "TRT_Attention":
            return
        if attribute_of(self.node, "softcap", 0.0):
            raise self._refuse("has a softcap, which TensorRT's attention hasn't")
        scale = float(attribute_of(self.node, "scale", 1 / sqrt(self._head_dim)))
        self.node.input[0] = self._times(self.node.input[0], scale)
        self.node.op_type = "TRT_Attention"
        self._unset("is_causal", "scale", "softcap", "qk_matmul_output_mode", "softmax_precision")

    def _ulysses(self) -> None:
        """Trade tokens for heads, and back behind the node."""
        if self._heads[0] % self.ranks:
            raise self._refuse(
                f"has {self._heads[0]} query heads, which don't divide among {self.ranks} ranks",
                "use -s allgather",
            )
        for number in range(3):
            name, heads = self.node.input[number], self._heads[number]
            if heads % self.ranks:
                name, heads = self._repeat_heads(name, heads), self.ranks
            traded = self._heads_to_ranks(name, heads // self.ranks)
            self.node.input[number] = self._first(KEYS, traded, 2) if number else traded
        self._tokens_to_ranks()

    def _repeat_heads(self, name: str, heads: int) -> str:
        if self.ranks % heads:
            raise self._refuse(
                f"has {heads} kv heads, which can't be dealt evenly to {self.ranks} ranks",
                "use -s allgather",
            )
        wanted = [rank * heads // self.ranks for rank in range(self.ranks)]
        indices = self._constant(np.array(wanted, np.int64))
        return self._op("Gather", [name, indices], axis=1)

    def _heads_to_ranks(self, name: str, part: int) -> str:
        """``[B, N, L, H]`` to ``[B, N/P, P·L, H]``."""
        by_rank = self._reshape(name, (0, self.ranks, part, -1, self._head_dim))
        traded = self._collective(self._transpose(by_rank, (1, 0, 2, 3, 4)), "all_to_all")
        heads_first = self._transpose(traded, (1, 2, 0, 3, 4))
        return self._reshape(heads_first, (0, 0, -1, self._head_dim))

    def _tokens_to_ranks(self) -> None:
        """``[B, N/P, P·L, H]`` to ``[B, N, L, H]``, behind the node."""
        to = self.after
        by_rank = self._reshape(self._result, (0, 0, self.ranks, -1, self._head_dim), to)
        traded = self._collective(self._transpose(by_rank, (2, 0, 1, 3, 4), to), "all_to_all", to)
        heads_first = self._transpose(traded, (1, 0, 2, 3, 4), to)
        self._reshape(heads_first, (0, self._heads[0], -1, self._head_dim), to)

    @property
    def _result(self) -> str:
        """Name what the nodes behind have made so far."""
        return str(self.after[-1].output[0]) if self.after else f"{self._prefix}_inner"

    def _reshape(self, name: str, shape: Sequence[int], where: list[Any] | None = None) -> str:
        """Reshape; 0 keeps a dim, -1 is what is left."""
        return self._op("Reshape", [name, self._constant(np.array(shape, np.int64))], where)

    def _transpose(self, name: str, order: Sequence[int], where: list[Any] | None = None) -> str:
        return self._op("Transpose", [name], where, perm=list(order))

    def _collective(self, name: str, operation: str, where: list[Any] | None = None) -> str:
        """Let the ranks exchange along dim 0."""
        if self.ranks == 1:
            return name
        rest = {"reduce_op": "none", "root": -1, RANK_COUNT: self.ranks}
        return self._op("DistCollective", [name], where, collective_operation=operation, **rest)

    def _first(self, keys: str, name: str, axis: int) -> str:
        """Keep as many keys as the input `keys` says."""
        self.numbers.append(keys)
        start, along = (self._constant(np.array([number], np.int64)) for number in (0, axis))
        return self._op("Slice", [name, start, keys, along])

    def _times(self, name: str, factor: float) -> str:
        """Scale in float32, so that the factor isn't rounded."""
        wide = self._op("Cast", [name], to=self._onnx.TensorProto.FLOAT)
        product = self._op("Mul", [wide, self._constant(np.array(factor, np.float32))])
        return self._op("Cast", [product], to=self._dtype)

    def _constant(self, values: Any) -> str:
        name = f"{self._prefix}_constant_{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(values, name))
        return name

    def _op(
        self, kind: str, inputs: Sequence[str], where: list[Any] | None = None, **attributes: Any
    ) -> str:
        """Add a node before the attention, or to the list `where`; return its output."""
        name = f"{self._prefix}_{kind}_{len(self.before) + len(self.after)}"
        node = self._onnx.helper.make_node(kind, inputs, [name], name=name, **attributes)
        (self.before if where is None else where).append(node)
        return name

    def _set(self, name: str, value: Any) -> None:
        self._unset(name)
        self.node.attribute.append(self._onnx.helper.make_attribute(name, value))

    def _unset(self, *names: str) -> None:
        kept = [attribute for attribute in self.node.attribute if attribute.name not in names]
        del self.node.attribute[:]
        self.node.attribute.extend(kept)
