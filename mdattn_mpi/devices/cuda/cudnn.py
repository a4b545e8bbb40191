"""cuDNN's fused attention on raw addresses: execution plans by shape, and what cuDNN refuses.

An execution plan is built for exact lengths: cuDNN 9.19's shared kernels ("dynamic shapes", a
kernel cache) keep the lengths of the first plan and compute garbage for the next. The kernel itself
is compiled once a head dim, dtype and mask (half a second); an execution plan for new lengths then
takes about 35 ms.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from mdattn_mpi.devices.cuda.attention import ONE, AttentionCall, Strides
from mdattn_mpi.devices.presence import EXTRA
from mdattn_mpi.errors import RejectedError

Q, K, V, OUTPUT, LSE = range(1, 6)


class PlanLaunch:
    """A built execution plan; see `attention.Launch`."""

    def __init__(self, engine: CudnnEngine, graph: Any) -> None:
        self._engine, self._graph = engine, graph
        self.workspace = int(graph.get_workspace_size())
        # The front end's public call looks at every argument as if it could be anything: 50 to
        # 100 µs, as long as the kernel itself. The call below it takes bare addresses.
        self._index: int | None = None
        try:
            lowered = graph._lowered_graph
            if graph._variant_pack_uids() == [Q, K, V, OUTPUT, LSE]:
                self._index = graph._materialize_backend_plan(graph._plan_index).cpp_index
                self._execute = lowered._execute_with_raw_ptrs
        except AttributeError:  # another version of the front end
            self._index = None

    def run(self, addresses: tuple[int, ...], workspace: int, stream: Any) -> None:
        """See `attention.Launch`."""
        handle = self._engine.handle(stream)
        if self._index is None:
            uids = dict(zip((Q, K, V, OUTPUT, LSE), addresses, strict=True))
            self._graph.execute(uids, workspace, handle=handle)
            return
        pointers = _Pointers(*addresses)
        self._execute(
            ctypes.addressof(pointers), len(pointers), workspace, handle.backend_handle, self._index
        )


_Pointers = ctypes.c_void_p * 5


class CudnnEngine:
    """cuDNN's attention on the current GPU, one handle a stream; see `attention.Engine`.

    Parameters
    ----------
    sm
        The compute capability, for messages.

    Raises
    ------
    RejectedError
        cuDNN or its front end isn't installed.

    """

    name = "cudnn"
    preparing = 0.04  # an execution plan takes 33 to 45 ms

    def __init__(self, sm: tuple[int, int]) -> None:
        self._cudnn = _load()
        self._sm = sm
        self._handles: dict[int, Any] = {}
        self._own = threading.local()  # a handle isn't for two threads at a time
        self._builders: list[Any] = []
        self.version = str(self._cudnn.backend_version_string())

    def refusal(self, call: AttentionCall) -> str:
        """See `attention.Engine`; only cuDNN itself knows, so it builds an execution plan."""
        if call.out_dtype != call.dtype:
            return "it rounds its output to 16 bits"
        if call.softcap:
            return "it has no soft cap"
        if call.documents != ONE:
            return "it takes one document a call"
        try:
            self._build(call)
        except (self._cudnn.cudnnGraphNotSupportedError, ValueError) as refusal:
            return " ".join(str(refusal).split())[:300]
        return ""

    def prepare(self, call: AttentionCall) -> PlanLaunch:
        """See `attention.Engine`."""
        try:
            return PlanLaunch(self, self._build(call))
        except (self._cudnn.cudnnGraphNotSupportedError, ValueError) as refusal:
            raise RejectedError(
                f"cuDNN {self.version} can't do a call of {call.q_tokens} × {call.kv_tokens} "
                f"tokens, head dims {call.head_dim} and {call.v_head_dim}, in {call.dtype} on this "
                f"GPU (SM {self._sm[0]}.{self._sm[1]}): {' '.join(str(refusal).split())[:300]}",
                fix="use --kernel flash, or -b cpu",
            ) from None

    def close(self) -> None:
        """Let go of the handles."""
        for handle in (*self._handles.values(), *self._builders):
            self._cudnn.destroy_handle(handle)
        self._handles.clear()
        self._builders.clear()

    def handle(self, stream: Any) -> Any:
        """Return the handle of a stream."""
        number = int(stream.handle)
        if number not in self._handles:
            self._handles[number] = self._cudnn.create_handle()
            self._cudnn.set_stream(handle=self._handles[number], stream=number)
        return self._handles[number]

    def _build(self, key: AttentionCall) -> Any:
        cudnn = self._cudnn
        types = cudnn.data_type
        dtype = {"bfloat16": types.BFLOAT16, "float16": types.HALF}[key.dtype]
        graph = cudnn.pygraph(
            io_data_type=dtype,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self._builder(),
        )

        def tensor(name: str, uid: int, tokens: int, heads: int, dim: int, strides: Strides) -> Any:
            dims, order = batch_first((tokens, heads, dim), strides)
            return graph.tensor(name=name, uid=uid, dim=dims, stride=order)

        q = tensor("q", Q, key.q_tokens, key.q_heads, key.head_dim, key.q)
        k = tensor("k", K, key.kv_tokens, key.kv_heads, key.head_dim, key.k)
        v = tensor("v", V, key.kv_tokens, key.kv_heads, key.v_head_dim, key.v)
        mask: dict[str, Any] = {}
        if key.mask != "none":
            mask["diagonal_alignment"] = cudnn.diagonal_alignment.BOTTOM_RIGHT
        before, after = key.band
        if after is not None:
            mask["diagonal_band_right_bound"] = after
        if before is not None:  # cuDNN counts the diagonal's own key
            mask["diagonal_band_left_bound"] = before + 1
        output, lse = graph.sdpa(
            name="sdpa", q=q, k=k, v=v, attn_scale=key.scale, generate_stats=True, **mask
        )
        dims, strides = batch_first((key.q_tokens, key.q_heads, key.v_head_dim), key.output)
        output.set_output(True).set_uid(OUTPUT).set_dim(dims).set_stride(strides)
        dims, strides = batch_first((key.q_tokens, key.q_heads, 1), (*key.lse, 1))
        lse.set_output(True).set_uid(LSE).set_dim(dims).set_stride(strides)
        lse.set_data_type(types.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return graph

    def _builder(self) -> Any:
        """Return the handle that this thread builds with."""
        if not hasattr(self._own, "handle"):
            self._own.handle = self._cudnn.create_handle()
            self._builders.append(self._own.handle)
        return self._own.handle


def batch_first(shape: tuple[int, ...], strides: Strides) -> tuple[list[int], list[int]]:
    """Say ``[tokens, heads, dim]`` as cuDNN does, ``[batch, heads, tokens, dim]``."""
    tokens, heads, dim = shape
    token, head, element = strides
    return [1, heads, tokens, dim], [tokens * token, head, token, element]


def _load() -> Any:
    try:
        import cudnn
    except ImportError as missing:
        raise RejectedError(f"cuDNN can't be loaded ({missing})", fix=EXTRA) from None
    return cudnn
