"""One attention of an ONNX model, shared by ranks: marked, or with collectives around it."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.masks import window_of
from mdattn_mpi.onnx.model import RANK_COUNT, WINDOW, attribute_of, import_onnx, name_of, operator
from mdattn_mpi.onnx.sharding import CAUSAL_KEYS, KEYS, POSITIONS
from mdattn_mpi.onnx.tokens import Shape, Tokens
from mdattn_mpi.problem import StrategyName


def mask_of(node: Any) -> str:
    """Tell which keys a query sees: ``none``, ``upper_left``, ``lower_right``, ``window``."""
    if window_of(node):
        return "window"
    if attribute_of(node, "is_causal", 0):
        return "upper_left"
    return str(attribute_of(node, "causal_kind", b"none").decode())


class Site:
    """One attention node, about to be shared; refused by name if it can't be."""

    def __init__(self, node: Any, tokens: Tokens, ranks: int, suffix: str = "") -> None:
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
        if attribute_of(node, RANK_COUNT, 1) != 1:
            raise self._refuse("is shared already", "shard the original model")
        if attribute_of(node, "softcap", 0.0):  # which TensorRT's parser refuses, or ignores
            raise self._refuse(
                "has a softcap, which TensorRT's attention hasn't",
                "run the model as it is, on CPUs: mdattn run … --model",
            )
        self._suffix = suffix
        self._shapes = tuple(self._shape(tokens, name) for name in node.input[:3])
        self._dtype = tokens.dtype(node.input[0])
        self._heads = tuple(self._count_heads(number) for number in range(3))
        self._dims = tuple(
            shape[-1] if len(shape) == 4 else shape[-1] // heads
            for shape, heads in zip(self._shapes, self._heads, strict=True)
        )
        self._mask = mask_of(node)
        self._says = "has a window" if self._mask == "window" else f"is causal ({self._mask})"
        query, key = (tokens.place(name) for name in node.input[:2])
        self._same_length = query is not None and key is not None and query[0] == key[0]

    def _shape(self, tokens: Tokens, name: str) -> Shape:
        shape, query = tokens.shape(name), tokens.shape(self.node.input[0])
        if shape is None or len(shape) not in (3, 4) or query is None or shape[0] != query[0]:
            raise self._refuse(f"takes {name!r} of shape {tokens.show(name)}")
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
            f"{self._shown} {why}", fix=fix or "shard the attention block alone, or use -n 1"
        )

    def share(self, strategy: StrategyName) -> str:
        """Rewrite the node; return what was done."""
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
            self.node.output[0] = f"{self._output}_mdattn_inner"
            self.after[-1].output[0] = self._output
        return f"{self._shown}: {done}"

    def _ring(self) -> None:
        if self._mask != "none":
            raise self._refuse(
                f"{self._says}: TensorRT's multi-device attention has no mask",
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
        if self._mask != "none" and not self._same_length:
            raise self._refuse(
                f"{self._says} over keys of another sequence than the queries'",
                "use -s ulysses" if self._mask == "upper_left" else "use -n 1",
            )
        keys = KEYS if self._mask in ("none", "window") else CAUSAL_KEYS
        for number in (1, 2):
            tokens_first = self._transpose(self.node.input[number], (2, 0, 1, 3))
            gathered = self._collective(tokens_first, "all_gather")
            seen = self._first(keys, gathered, 0)
            self.node.input[number] = self._transpose(seen, (1, 2, 0, 3))
        if self._mask == "window":
            self.numbers.append(POSITIONS + self._suffix)
            self._write_window(POSITIONS + self._suffix)
        elif self._mask != "none":
            self._make_trt_attention()
            self._set("causal_kind", "lower_right")

    def _write_window(self, rows: str) -> None:
        """Block the keys outside of the window, for queries at the positions `rows`."""
        before, after = window_of(self.node) or (-1, -1)
        self._unset(WINDOW)
        column = self._reshape(rows, (-1, 1))
        distance = self._op("Sub", [column, self._numbers(KEYS + self._suffix)])
        seen = [
            self._op("LessOrEqual", [each, self._constant(np.array(most, np.int64))])
            for each, most in ((distance, before), (self._op("Neg", [distance]), after))
            if most >= 0
        ]
        both = self._op("And", seen) if len(seen) > 1 else seen[0]
        self.node.input.append(
            self._op("Unsqueeze", [both, self._constant(np.array([0, 1], np.int64))])
        )

    def _numbers(self, count: str) -> str:
        """0, 1, … up to a count of one element."""
        zero, one = (self._constant(np.array(number, np.int64)) for number in (0, 1))
        number = self._op("Squeeze", [count, self._constant(np.array([0], np.int64))])
        return self._op("Range", [zero, number, one])

    def _make_trt_attention(self) -> None:
        """Take the operator that alone has ``lower_right``, and that has no scale."""
        if operator(self.node) == "TRT_Attention":
            return
        scale = float(attribute_of(self.node, "scale", 1 / sqrt(self._dims[0])))
        self.node.input[0] = self._times(self.node.input[0], scale)
        self.node.op_type = "TRT_Attention"
        self._unset("is_causal", "scale", "softcap", "qk_matmul_output_mode", "softmax_precision")

    def _ulysses(self) -> None:
        """Trade tokens for heads, and back behind the node.

        Rows at the end fill up the shards of the queries, and those of the keys are left out: that
        moves a mask which is aligned with the last row and the last key.
        """
        if self._mask in ("lower_right", "window") and not self._same_length:
            raise self._refuse(
                f"{self._says} over keys of another sequence than the queries'", "use -n 1"
            )
        if self._mask == "lower_right":
            self._set("causal_kind", "upper_left")  # the same, for equal lengths
        if self._heads[0] % self.ranks:
            raise self._refuse(
                f"has {self._heads[0]} query heads, which don't divide among {self.ranks} ranks",
                "use -s allgather",
            )
        for number in range(3):
            name, heads = self.node.input[number], self._heads[number]
            if heads % self.ranks:
                name, heads = self._repeat_heads(name, heads), self.ranks
            traded = self._heads_to_ranks(name, heads // self.ranks, self._dims[number])
            self.node.input[number] = self._first(KEYS, traded, 2) if number else traded
        if self._mask == "window":
            self.numbers.append(POSITIONS + self._suffix)
            self._write_window(self._collective(POSITIONS + self._suffix, "all_gather"))
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

    def _heads_to_ranks(self, name: str, part: int, dim: int) -> str:
        """``[B, N, L, H]`` to ``[B, N/P, P·L, H]``."""
        by_rank = self._reshape(name, (0, self.ranks, part, -1, dim))
        traded = self._collective(self._transpose(by_rank, (1, 0, 2, 3, 4)), "all_to_all")
        heads_first = self._transpose(traded, (1, 2, 0, 3, 4))
        return self._reshape(heads_first, (0, 0, -1, dim))

    def _tokens_to_ranks(self) -> None:
        """``[B, N/P, P·L, H]`` to ``[B, N, L, H]``, behind the node."""
        to = self.after
        by_rank = self._reshape(self._result, (0, 0, self.ranks, -1, self._dims[2]), to)
        traded = self._collective(self._transpose(by_rank, (2, 0, 1, 3, 4), to), "all_to_all", to)
        heads_first = self._transpose(traded, (1, 0, 2, 3, 4), to)
        self._reshape(heads_first, (0, self._heads[0], -1, self._dims[2]), to)

    @property
    def _result(self) -> str:
        """Name what the nodes behind have made so far."""
        return str(self.after[-1].output[0]) if self.after else f"{self._output}_mdattn_inner"

    def _reshape(self, name: str, shape: Sequence[int], where: list[Any] | None = None) -> str:
        """Reshape; 0 keeps a dim, -1 is what is left."""
        return self._op("Reshape", [name, self._constant(np.array(shape, np.int64))], where)

    def _transpose(self, name: str, order: Sequence[int], where: list[Any] | None = None) -> str:
        return self._op("Transpose", [name], where, perm=list(order))

    def _collective(self, name: str, operation: str, where: list[Any] | None = None) -> str:
        """Let the ranks exchange along dim 0."""
        rest = {"reduce_op": "none", "root": -1, RANK_COUNT: self.ranks}
        return self._op("DistCollective", [name], where, collective_operation=operation, **rest)

    def _first(self, keys: str, name: str, axis: int) -> str:
        """Keep as many keys as the input `keys` says."""
        keys += self._suffix
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
