"""exp of float32 in place, by the faster one of the libraries that are installed.

Much of attention's time on a CPU is exp. NumPy's is fast with AVX-512; with AVX2 alone it
stores vectors through masks and takes far longer than ONNX Runtime's, which is used there if it is
installed: the extra ``fast``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# An ONNX model of one node, y = Exp(x), over vectors of any length; opset 17.
MODEL = (
    b'\x08\x08:4\n\x0b\n\x01x\x12\x01y"\x03Exp\x12\x01gZ\x10\n\x01x\x12\x0b\n\t\x08\x01\x12\x05\n'
    b"\x03\x12\x01nb\x10\n\x01y\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\x11"
)

FEW = 1 << 15  # numbers; with fewer, what a call of ONNX Runtime costs outweighs the gain


class Exponential(NamedTuple):
    """Replaces contiguous float32 numbers by their exp; any number of threads may call it."""

    library: str
    apply: Callable[[NDArray[np.float32]], Any]


def numpy_exp() -> Exponential:
    """The one that is always there."""
    return Exponential(f"numpy {np.__version__}", lambda numbers: np.exp(numbers, out=numbers))


@cache
def fastest_exp() -> Exponential:
    """ONNX Runtime's where it is installed and NumPy's has no AVX-512, else NumPy's."""
    if _numpy_has_avx512():
        return numpy_exp()
    try:
        return _onnxruntime_exp()
    except ImportError:
        return numpy_exp()


def _numpy_has_avx512() -> bool:
    core = "_core" if find_spec("numpy._core") else "core"  # NumPy 2, NumPy 1
    features = import_module(f"numpy.{core}._multiarray_umath").__cpu_features__
    return bool(features.get("AVX512F") or features.get("X86_V4"))


def _onnxruntime_exp() -> Exponential:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the caller's own
    session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])

    class Bound(threading.local):
        def __init__(self) -> None:
            self.io = session.io_binding()

    bound = Bound()

    def apply(numbers: NDArray[np.float32]) -> None:
        if numbers.size < FEW:
            np.exp(numbers, out=numbers)
            return
        place = ("cpu", 0, np.float32, [numbers.size], numbers.ctypes.data)
        bound.io.bind_input("x", *place)
        bound.io.bind_output("y", *place)
        session.run_with_iobinding(bound.io)

    return Exponential(f"onnxruntime {onnxruntime.__version__}", apply)
