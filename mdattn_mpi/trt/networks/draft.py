"""The pieces that every attention network is written in."""

from __future__ import annotations

from typing import Any

import numpy as np

from mdattn_mpi.errors import DeviceError
from mdattn_mpi.trt.spec import EngineSpec, Extent
from mdattn_mpi.trt.versions import Form

HEADS_FIRST = (1, 0, 2)
HEADS_FIRST_BY_RANK = (1, 0, 2, 3)


class Draft:
    """A TensorRT network under construction, for one `EngineSpec`, in one `Form`."""

    def __init__(self, api: Any, network: Any, spec: EngineSpec, form: Form) -> None:
        self.api = api
        self.network = network
        self.spec = spec
        self.form = form
        self._dtype = {"bfloat16": api.bfloat16, "float16": api.float16}[spec.dtype]

    def tokens(self, name: str, heads: int, extent: Extent) -> Any:
        """Add the input `name` ``[L, heads, H]``."""
        length = extent.max if extent.static else -1
        shape = (length, heads, self.spec.head_dim)
        return self.network.add_input(name, self._dtype, shape)

    def query(self) -> Any:
        """Add the input ``query``, times the scale.

        TensorRT's attention has no scale of its own: it belongs into the query. The product is
        taken in float32, so that the scale isn't rounded, and the query only once.
        """
        spec, api = self.spec, self.api
        query = self.tokens("query", spec.q_heads, spec.q)
        wide = self._cast(query, api.float32)
        scale = self._constant(np.full((1, 1, 1), spec.scale, np.float32))
        product = self.network.add_elementwise(wide, scale, api.ElementWiseOperation.PROD)
        return self._cast(self._out(product), self._dtype)

    def key_and_value(self) -> tuple[Any, Any]:
        """Add the inputs ``key`` and ``value``."""
        spec = self.spec
        key = self.tokens("key", spec.kv_heads, spec.kv)
        value = self.tokens("value", spec.kv_heads, spec.kv)
        if not spec.kv.static:
            key.set_dimension_name(0, "kv")
            value.set_dimension_name(0, "kv")
        return key, value

    def collective(self, tensor: Any, operation: str) -> Any:
        """Let the ranks exchange along dim 0: ``ALL_GATHER`` or ``ALL_TO_ALL``.

        Always all ranks of the communicator: a list of some of them is ignored by some versions.
        """
        if self.spec.ranks == 1:
            return tensor
        api = self.api
        layer = self.network.add_dist_collective(
            self._cast(tensor, api.float32) if self.form.border else tensor,
            getattr(api.CollectiveOperation, operation),
            api.ReduceOperation.NONE,
            -1,
            np.zeros(0, np.int64),
        )
        self._out(layer)
        layer.num_ranks = self.spec.ranks
        layer.name = f"{operation} of {tensor.name}"  # what an engine's inspector shows
        traded = layer.get_output(0)
        return self._cast(traded, self._dtype) if self.form.border else traded

    def first_keys(self, *tensors: Any) -> tuple[Any, ...]:
        """Keep of each ``[S, N, H]`` the keys that count, where that is known at run time only."""
        if not self.spec.takes_keys:
            return tensors
        keys = self.network.add_input("keys", self.api.int64, (1,))
        return tuple(self._first(tensor, keys) for tensor in tensors)

    def _first(self, tensor: Any, keys: Any) -> Any:
        rest = self._constant(np.array(tuple(tensor.shape)[1:], np.int64))
        size = self._out(self.network.add_concatenation([keys, rest]))
        layer = self.network.add_slice(tensor, (0, 0, 0), (0, 0, 0), (1, 1, 1))
        layer.set_input(2, size)
        return self._out(layer)

    def pick_heads(self, tensor: Any, heads: list[int]) -> Any:
        """Make ``[S, len(heads), H]`` of ``[S, N, H]``."""
        return self._out(
            self.network.add_gather(tensor, self._constant(np.array(heads, np.int64)), 1)
        )

    def attention(self, query: Any, key: Any, value: Any, ring_ranks: int = 1) -> Any:
        """Attend: ``[S, N, H]`` in and out, the mask of the spec.

        TensorRT's multi-device attention takes no packed inputs, so heads go first.
        """
        api = self.api
        inputs = [self._heads_first(tensor) for tensor in (query, key, value)]
        if self.form.wide:
            inputs = [self._cast(tensor, api.float32) for tensor in inputs]
        layer = self.network.add_attention_v2(
            *inputs,
            api.AttentionNormalizationOp.SOFTMAX,
            getattr(api.CausalMaskKind, self.spec.mask.upper()),
        )
        self._out(layer)
        if ring_ranks > 1:
            layer.num_ranks = ring_ranks  # once: it can't be changed again
        heads, dim = tuple(query.shape)[1:]
        found = layer.get_output(0)
        back = self.network.add_shuffle(self._cast(found, self._dtype) if self.form.wide else found)
        back.reshape_dims = (heads, -1, dim)
        back.second_transpose = self.api.Permutation(HEADS_FIRST)
        return self._out(back)

    def _heads_first(self, tensor: Any) -> Any:
        heads, dim = tuple(tensor.shape)[1:]
        layer = self.network.add_shuffle(tensor)
        layer.first_transpose = self.api.Permutation(HEADS_FIRST)
        layer.reshape_dims = (1, heads, -1, dim)
        return self._out(layer)

    def heads_to_ranks(self, tensor: Any) -> Any:
        """Trade tokens for heads: ``[L, N, H]`` of a rank for ``[P·L, N/P, H]`` of its heads."""
        ranks = self.spec.ranks
        heads, dim = tuple(tensor.shape)[1:]
        part = heads // ranks
        by_rank = self.network.add_shuffle(tensor)
        by_rank.reshape_dims = (-1, ranks, part, dim)
        by_rank.second_transpose = self.api.Permutation(HEADS_FIRST_BY_RANK)
        traded = self.collective(self._out(by_rank), "ALL_TO_ALL")
        joined = self.network.add_shuffle(traded)
        joined.reshape_dims = (-1, part, dim)
        return self._out(joined)

    def tokens_to_ranks(self, tensor: Any) -> Any:
        """Undo `heads_to_ranks`: ``[P·L, N/P, H]`` for ``[L, N, H]``."""
        ranks = self.spec.ranks
        part, dim = tuple(tensor.shape)[1:]
        by_rank = self.network.add_shuffle(tensor)
        by_rank.reshape_dims = (ranks, -1, part, dim)
        traded = self.collective(self._out(by_rank), "ALL_TO_ALL")
        joined = self.network.add_shuffle(traded)
        joined.first_transpose = self.api.Permutation(HEADS_FIRST_BY_RANK)
        joined.reshape_dims = (-1, ranks * part, dim)
        return self._out(joined)

    def output(self, tensor: Any) -> None:
        """Mark `tensor` as the output ``output``."""
        tensor.name = "output"
        self.network.mark_output(tensor)

    def _cast(self, tensor: Any, dtype: Any) -> Any:
        return self._out(self.network.add_cast(tensor, dtype))

    def _constant(self, values: Any) -> Any:
        return self._out(self.network.add_constant(values.shape, values))

    def _out(self, layer: Any) -> Any:
        """Return the only output of `layer`, which TensorRT may have refused to make."""
        if layer is None:
            raise DeviceError(
                f"TensorRT made no layer for {self.spec}", fix="see the log, or use -b cuda"
            )
        return layer.get_output(0)
