"""The caller's arrays: which are taken, and how an output of their kind is made."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import ml_dtypes
import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.problem import DTypeName

_CUDA = 2  # DLPack's kDLCUDA
_MOST_TOKENS = 1 << 32  # of a rank: two such numbers travel in a word of an agreement


class Shards(NamedTuple):
    """A rank's own arrays, and the backend that takes them where they live.

    On the host they are NumPy's, over the caller's memory; `give` makes of such an array one of the
    caller's kind.
    """

    q: Any
    k: Any
    v: Any
    dtype: DTypeName
    backend: str
    give: Callable[[Any], Any]
    sinks: Any = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What a strategy takes: the three, and the sinks if there are any."""
        return self[:3] if self.sinks is None else (*self[:3], self.sinks)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of the three."""
        return tuple(tuple(array.shape) for array in self[:3])

    @property
    def tokens(self) -> int:
        """The tokens of the query and those of key and value, in one number; see `tokens_of`."""
        return len(self.q) * _MOST_TOKENS + len(self.k)

    @property
    def sinks_crc32(self) -> int:
        """The CRC-32 of the sinks; 0 where there are none, or they are on a GPU."""
        return 0 if self.sinks is None or self.backend != "cpu" else crc32_of(self.sinks)


def crc32_of(array: Any) -> int:
    """The CRC-32 of an array on the host."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def tokens_of(number: int) -> tuple[int, int]:
    """Take apart what `Shards.tokens` says."""
    return divmod(number, _MOST_TOKENS)


def shards_of(q: Any, k: Any, v: Any, sinks: Any = None) -> Shards:
    """Check the arrays of a rank, without copying one.

    Raises
    ------
    RejectedError
        Their kind, dtype or shape isn't supported, or they don't fit together.

    """
    backends = {_backend_for(array) for array in (q, k, v)}
    dtypes = [_dtype_name(array) for array in (q, k, v)]
    shapes = [tuple(array.shape) for array in (q, k, v)]
    if len(backends) > 1 or len(set(dtypes)) > 1 or dtypes[0] not in get_args(DTypeName):
        places = f", on {' and '.join(sorted(backends))}" if len(backends) > 1 else ""
        raise RejectedError(
            f"q, k, v are {', '.join(dtypes)}{places}",
            fix="give all three as bfloat16 (ml_dtypes.bfloat16 in NumPy) or all as float16, in "
            "one place",
        )
    _check_shapes(shapes)
    backend, give = backends.pop(), _as_it_is
    if backend == "cpu":
        give = _to_torch if _is_torch(q) else _as_it_is
        q, k, v = (_on_host(array) for array in (q, k, v))
    if sinks is not None:
        sinks = _checked_sinks(sinks, backend, shapes[0][1])
    return Shards(q, k, v, dtypes[0], backend, give, sinks)


def _checked_sinks(sinks: Any, backend: str, heads: int) -> Any:
    """Take the sinks of all heads, in the place where the other arrays are."""
    shape, dtype, place = tuple(sinks.shape), _dtype_name(sinks), _backend_for(sinks)
    if shape != (heads,) or dtype != "float32" or place != backend:
        raise RejectedError(
            f"sinks are {dtype} {list(shape)}, on {place}",
            fix=f"give float32 [{heads}], one of each query head, where q, k and v are",
        )
    return sinks.detach().numpy() if backend == "cpu" and _is_torch(sinks) else sinks


def _check_shapes(shapes: list[tuple[int, ...]]) -> None:
    what = f"q, k, v have shapes {', '.join(map(str, shapes))}"
    if {len(shape) for shape in shapes} != {3}:
        raise RejectedError(
            what, fix="give [tokens, heads, head dim] each; an item without a batch dim at a time"
        )
    if shapes[1][:2] != shapes[2][:2] or shapes[0][2] != shapes[1][2]:
        raise RejectedError(
            what, fix="give k and v the same tokens and heads, and q and k the same head dim"
        )
    if max(shape[0] for shape in shapes) >= _MOST_TOKENS:
        raise RejectedError(what, fix=f"give a rank fewer than {_MOST_TOKENS} tokens")


def _backend_for(array: Any) -> str:
    """Name the backend that takes an array where it lives."""
    if isinstance(array, np.ndarray) and array.dtype.isnative:
        return "cpu"
    if _is_torch(array):
        _refuse_gradients(array)
        if array.device.type == "cpu" and array.layout == _torch().strided:
            return "cpu"
    if not isinstance(array, np.ndarray) and hasattr(array, "__dlpack_device__"):
        kind, _ = array.__dlpack_device__()
        if kind == _CUDA:
            return "cuda"
    raise RejectedError(
        f"{type(array).__name__} is neither a NumPy array of native byte order, nor a dense tensor "
        "of PyTorch, nor on a GPU",
        fix="give NumPy arrays, PyTorch tensors, or arrays on a GPU that offer DLPack",
    )


def _dtype_name(array: Any) -> Any:
    """The name without the library's: PyTorch says ``torch.bfloat16``."""
    return str(array.dtype).rpartition(".")[2]


def _as_it_is(array: Any) -> Any:
    return array


# PyTorch is not imported for this: whoever has a tensor has imported it.


def _torch() -> Any:
    return sys.modules["torch"]


def _is_torch(array: Any) -> bool:
    return "torch" in sys.modules and isinstance(array, _torch().Tensor)


def _refuse_gradients(tensor: Any) -> None:
    if tensor.requires_grad and _torch().is_grad_enabled():
        raise RejectedError(
            "a tensor requires a gradient, and there is no backward pass: training would go on "
            "without it",
            fix="call within torch.no_grad(), or give tensor.detach()",
        )


def _on_host(tensor: Any) -> Any:
    """NumPy's view of an array in host memory. PyTorch gives it no BF16 but as integers."""
    if not _is_torch(tensor):
        return tensor
    bits = tensor.detach().view(_torch().int16).numpy()
    return bits.view(ml_dtypes.bfloat16 if _dtype_name(tensor) == "bfloat16" else np.float16)


def _to_torch(array: Any) -> Any:
    torch = _torch()
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    bits = torch.from_numpy(array.view(np.int16))
    return bits.view(torch.float16 if array.dtype == np.float16 else torch.bfloat16)
