"""FlashAttention 4 as an `attention.Engine`."""

from __future__ import annotations

import os
import threading
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mdattn_mpi.devices.cuda.attention import ONE, AttentionCall
from mdattn_mpi.devices.cuda.flash import store
from mdattn_mpi.devices.cuda.flash.key import KernelKey
from mdattn_mpi.devices.cuda.flash.tvm import FunctionLaunch, open_library
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.files import cache_folder
from mdattn_mpi.text import install

EXTRA = install("flash")
# Of a beta: other versions may compile, and compute something else. setup.cfg has the same.
PINNED = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1"}
ALSO = ("apache-tvm-ffi", "quack-kernels")
ARCHITECTURES = {9: "sm_90a", 10: "sm_100a"}
LARGEST = {9: 256, 10: 128}  # head dim
TILE_DIM = 16  # head dims are rounded up to multiples of it


def why_not(sm: tuple[int, int]) -> str:
    """Say why FlashAttention can't be used on such a GPU; empty when it can. Imports nothing."""
    if sm[0] not in ARCHITECTURES:
        return f"not built for SM {sm[0]}.{sm[1]} here"
    for package, wanted in PINNED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            return f"{package} isn't installed ({EXTRA})"
        if found != wanted:
            return f"{package} is {found}, and {wanted} is the one that was checked ({EXTRA})"
    return ""


class FlashEngine:
    """FlashAttention 4 on one GPU; PyTorch is imported with it.

    Parameters
    ----------
    sm, ordinal
        The compute capability, and which of the visible GPUs it is.

    Raises
    ------
    RejectedError
        It can't be imported, or its cache isn't safe.

    """

    name = "flash"
    preparing = 0.0

    def __init__(self, sm: tuple[int, int], ordinal: int) -> None:
        os.environ["CUTE_DSL_ARCH"] = ARCHITECTURES[sm[0]]  # read when it is imported
        try:
            from cutlass.cute.runtime import load_module
            from flash_attn.cute import cache_utils  # opens what a loaded kernel needs

            kernels = import_module(f"mdattn_mpi.devices.cuda.flash.sm{sm[0]}0")
        except ImportError as missing:
            raise RejectedError(
                f"FlashAttention can't be loaded ({missing})", fix=f"{EXTRA}, or use --kernel cudnn"
            ) from None
        del cache_utils
        self._sm, self._ordinal = sm, ordinal
        self._compile, self._load_module = kernels.compile_kernel, load_module
        self._library = open_library()
        self._store = store.Store(
            cache_folder("flash"), {name: version(name) for name in (*PINNED, *ALSO)}
        )
        self._functions: dict[KernelKey, Any] = {}
        self._compiling = threading.Lock()
        self._modules: list[Any] = []
        self.version = f"{PINNED['flash-attn-4']}, CUTLASS DSL {PINNED['nvidia-cutlass-dsl']}"

    def refusal(self, call: AttentionCall) -> str:
        """See `attention.Engine`."""
        return refusal(call, self._sm)

    def prepare(self, call: AttentionCall) -> FunctionLaunch:
        """See `attention.Engine`: a kernel is compiled once for all lengths."""
        why = refusal(call, self._sm)
        if why:
            raise RejectedError(f"FlashAttention can't do this: {why}", fix="use --kernel cudnn")
        key = KernelKey.of(call, self._sm)
        return FunctionLaunch(self._library, self._function(key), call, self._ordinal, key)

    def close(self) -> None:
        """Let go of the functions; compiled code stays loaded, as CUDA has it."""
        self._functions.clear()

    def _function(self, key: KernelKey) -> Any:
        with self._compiling:  # the compiler is for one thread at a time
            if key not in self._functions:
                try:
                    self._functions[key] = self._store.get(key, self._compile, self._load)
                except Exception as error:  # the compiler's errors have no class in common
                    words = " ".join(str(error).split())[:300]
                    raise RejectedError(
                        f"FlashAttention can't be compiled for {key}: {words}",
                        fix="use --kernel cudnn",
                    ) from error
        return self._functions[key]

    def _load(self, path: str) -> Any:
        module = self._load_module(path, enable_tvm_ffi=True)
        self._modules.append(module)
        return getattr(module, store.SYMBOL)


def refusal(call: AttentionCall, sm: tuple[int, int]) -> str:
    """Say why the kernel of an architecture can't do a call; empty where it can."""
    largest = LARGEST[sm[0]]
    dims = (call.head_dim, call.v_head_dim)
    if any(dim % 8 or not 8 <= dim <= largest for dim in dims):
        return f"head dims {dims[0]} and {dims[1]}: it takes multiples of 8 up to {largest}"
    if -(-dims[1] // TILE_DIM) > -(-dims[0] // TILE_DIM):
        # The tile of the output takes the place of the queries' in shared memory: with H = 40 and
        # Hv = 256 it wrote beyond that (CUDA error 700 on an H100).
        return f"head dims {dims[0]} and {dims[1]}: the values' can't be larger than the queries'"
    if call.documents != ONE and sm[0] != 9:
        return f"packed documents on SM {sm[0]}.{sm[1]}: not built here"
    if call.dtype not in ("bfloat16", "float16"):
        return f"dtype {call.dtype}: it takes bfloat16 and float16"
    return ""
