"""Calls of TVM FFI's functions through its C interface: no tensor object of any library is made.

A call takes some microseconds this way. Tensors are DLPack's, which a function reads during the
call only; the stream goes in as an argument, so that nobody's current stream matters.
"""

from __future__ import annotations

import ctypes
from typing import Any

from mdattn_mpi.devices.cuda.attention import AttentionCall
from mdattn_mpi.devices.cuda.dlpack import CODES, CUDA, Tensor
from mdattn_mpi.devices.cuda.flash.key import KernelKey
from mdattn_mpi.errors import DeviceError

INTEGER, FLOAT, POINTER, TENSOR = 1, 3, 4, 7  # `TVMFFITypeIndex`
UNBOUNDED = 1 << 30  # tokens to a side: beyond all keys, and sums of two still fit 32 bits
OBJECT_HEADER = 24  # bytes before what an object holds
BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "int32": 32}


class _Value(ctypes.Union):
    _fields_ = (
        ("integer", ctypes.c_int64),
        ("number", ctypes.c_double),
        ("pointer", ctypes.c_void_p),
    )


class _Argument(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", _Value))


class _Error(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_void_p),
        ("kind_size", ctypes.c_size_t),
        ("message", ctypes.c_void_p),
        ("message_size", ctypes.c_size_t),
    )


_Arguments = _Argument * 12


class FunctionLaunch:
    """An attention call of a compiled function; see `attention.Launch`.

    Parameters
    ----------
    library
        TVM FFI's own, opened.
    function
        A ``tvm_ffi.Function``; kept.
    call, ordinal
        What is computed, and on which GPU.
    key
        Which function it is.

    """

    workspace = 0

    def __init__(
        self, library: Any, function: Any, call: AttentionCall, ordinal: int, key: KernelKey
    ) -> None:
        self._library, self._function = library, function
        self._handle = ctypes.c_void_p(function.__chandle__())
        rows, keys = call.q_tokens, call.kv_tokens
        q_heads, kv_heads = call.q_heads, call.kv_heads
        token, head = call.lse
        dims: tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...] = (
            ((rows, q_heads, call.head_dim), call.q, call.dtype),
            ((keys, kv_heads, call.head_dim), call.k, call.dtype),
            ((keys, kv_heads, call.v_head_dim), call.v, call.dtype),
            ((rows, q_heads, call.v_head_dim), call.output, call.out_dtype),
            ((q_heads, rows), (head, token), "float32"),
        )
        before = (*[key.batch] * 3, *[key.ones] * 2)
        self._tensors = [
            tensor(*each, ordinal, ones) for each, ones in zip(dims, before, strict=True)
        ]
        self._tensors += [
            tensor((len(starts),), (1,), "int32", ordinal, 0) for starts in call.documents if starts
        ]
        self._arguments = _Arguments()  # those that are left out stay None, which is all zeros
        for argument, array in zip(self._arguments, self._tensors, strict=False):
            argument.type, argument.value.pointer = TENSOR, ctypes.addressof(array)
        numbers, bounds = self._arguments[7:9], self._arguments[9:11]
        for argument, number in zip(numbers, (call.scale, call.softcap), strict=True):
            argument.type, argument.value.number = FLOAT, number
        for argument, bound in zip(bounds, call.band, strict=True):
            argument.type = INTEGER
            argument.value.integer = UNBOUNDED if bound is None else bound
        self._stream = self._arguments[11]
        self._stream.type = POINTER
        self._result = _Argument()

    def run(self, addresses: tuple[int, ...], workspace: int, stream: Any) -> None:
        """See `attention.Launch`."""
        for array, address in zip(self._tensors, addresses, strict=True):
            array.data = address
        self._stream.value.pointer = int(stream.handle)
        arguments, result = self._arguments, ctypes.byref(self._result)
        if self._library.TVMFFIFunctionCall(self._handle, arguments, len(arguments), result):
            raise DeviceError(f"FlashAttention: {_raised(self._library)}")


def tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, ordinal: int, ones: int
) -> Tensor:
    """Describe an array on GPU `ordinal`, after some dims of one; without its address."""
    whole = max(n * step for n, step in zip(shape, strides, strict=True))
    ndim = ones + len(shape)
    extents, steps = (
        (ctypes.c_int64 * ndim)(*numbers)
        for numbers in (((1,) * ones) + shape, ((whole,) * ones) + strides)
    )
    found = Tensor(
        device_type=CUDA, device_id=ordinal, ndim=ndim, code=CODES[dtype],
        bits=BITS[dtype], lanes=1,
    )  # fmt: skip
    found.shape, found.strides = extents, steps  # ctypes keeps them
    return found


def open_library() -> Any:
    """Open TVM FFI's C interface."""
    from tvm_ffi import libinfo

    return ctypes.CDLL(libinfo.find_libtvm_ffi())


def _raised(library: Any) -> str:
    """Take what the last call raised, as words."""
    handle = ctypes.c_void_p()
    library.TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
    if not handle.value:
        return "the launch failed"
    error = _Error.from_address(handle.value + OBJECT_HEADER)
    words = ctypes.string_at(error.message, error.message_size).decode(errors="replace")
    library.TVMFFIObjectDecRef(handle)
    return " ".join(words.split())[:500]
