"""cuDNN's fused attention on raw addresses: plans by shape, and what cuDNN refuses.

A plan is built for exact lengths: cuDNN 9.19's shared kernels ("dynamic shapes", a kernel cache)
keep the lengths of the first plan and compute garbage for the next. The kernel itself is compiled
once a head dim, dtype and mask (half a second); a plan for new lengths then takes about 35 ms.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from typing import Any, NamedTuple

from mdattn_mpi.errors import RejectedError

EXTRA = "pip install 'mdattn_mpi[cuda]'"
MOST_PLANS = 2048
Q, K, V, OUTPUT, LSE = range(1, 6)

Strides = tuple[int, ...]


class PlanKey(NamedTuple):
    """Everything that a plan depends on; strides are of ``[tokens, heads, dim]``, in elements.

    ``causal`` means ``lower_right``: the last row sees all keys.
    """

    q_tokens: int
    kv_tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str
    causal: bool
    scale: float
    q: Strides
    k: Strides
    v: Strides
    output: Strides
    lse: Strides


class Plan:
    """A built plan.

    Attributes
    ----------
    workspace
        Bytes that a launch needs besides the arrays.

    """

    def __init__(self, graph: Any) -> None:
        self._graph = graph
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

    def launch(self, addresses: tuple[int, ...], workspace: int, handle: Any) -> None:
        """Run on the stream of `handle`."""
        if self._index is None:
            uids = dict(zip((Q, K, V, OUTPUT, LSE), addresses, strict=True))
            self._graph.execute(uids, workspace, handle=handle)
            return
        pointers = _Pointers(*addresses)
        self._execute(
            ctypes.addressof(pointers), len(pointers), workspace, handle.backend_handle, self._index
        )


_Pointers = ctypes.c_void_p * 5


class Sdpa:
    """Attention calls on the current GPU, one cuDNN handle a stream.

    Parameters
    ----------
    sm
        The compute capability, for messages.

    Raises
    ------
    RejectedError
        cuDNN or its front end isn't installed.

    """

    def __init__(self, sm: tuple[int, int]) -> None:
        self._cudnn = _load()
        self._sm = sm
        self._handles: dict[int, Any] = {}
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self.version = str(self._cudnn.backend_version_string())
        self.built = 0

    def plan(self, key: PlanKey) -> Plan:
        """Build the plan of `key`, or take it from the cache.

        Raises
        ------
        RejectedError
            cuDNN has no kernel for it on this GPU.

        """
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        try:
            plan = self._plans[key] = Plan(self._build(key))
        except (self._cudnn.cudnnGraphNotSupportedError, ValueError) as refusal:
            raise self._refusal(key, refusal) from None
        self.built += 1
        if len(self._plans) > MOST_PLANS:
            self._plans.popitem(last=False)
        return plan

    def run(self, plan: Plan, addresses: tuple[int, ...], workspace: int, stream: Any) -> None:
        """Attend: the addresses of query, key, value, output and LSE, in this order."""
        plan.launch(addresses, workspace, self._handle(stream))

    def close(self) -> None:
        """Let go of plans and handles."""
        self._plans.clear()
        for handle in self._handles.values():
            self._cudnn.destroy_handle(handle)
        self._handles.clear()

    def _handle(self, stream: Any) -> Any:
        number = int(stream.handle)
        if number not in self._handles:
            self._handles[number] = self._cudnn.create_handle()
            self._cudnn.set_stream(handle=self._handles[number], stream=number)
        return self._handles[number]

    def _build(self, key: PlanKey) -> Any:
        cudnn = self._cudnn
        types = cudnn.data_type
        dtype = {"bfloat16": types.BFLOAT16, "float16": types.HALF}[key.dtype]
        graph = cudnn.pygraph(
            io_data_type=dtype,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self._any_handle(),
        )

        def tensor(name: str, uid: int, tokens: int, heads: int, dim: int, strides: Strides) -> Any:
            dims, order = batch_first((tokens, heads, dim), strides)
            return graph.tensor(name=name, uid=uid, dim=dims, stride=order)

        q = tensor("q", Q, key.q_tokens, key.q_heads, key.head_dim, key.q)
        k = tensor("k", K, key.kv_tokens, key.kv_heads, key.head_dim, key.k)
        v = tensor("v", V, key.kv_tokens, key.kv_heads, key.v_head_dim, key.v)
        mask = {}
        if key.causal:
            mask["diagonal_alignment"] = cudnn.diagonal_alignment.BOTTOM_RIGHT
            mask["diagonal_band_right_bound"] = 0
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

    def _any_handle(self) -> Any:
        if not self._handles:
            self._handles[0] = self._cudnn.create_handle()
        return next(iter(self._handles.values()))

    def _refusal(self, key: PlanKey, refusal: Exception) -> RejectedError:
        reason = " ".join(str(refusal).split())[:300]
        major, minor = self._sm
        return RejectedError(
            f"cuDNN {self.version} can't do attention of head dims {key.head_dim} and "
            f"{key.v_head_dim} in {key.dtype} on this GPU (SM {major}.{minor}): {reason}",
            fix="use -b cpu, or head dims that are multiples of 8",
        )


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
