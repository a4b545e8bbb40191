"""exp of float32 in place, by the faster one of the libraries that are installed.

Much of attention's time on a CPU is exp. ONNX Runtime's takes a half to a third of the time of
NumPy's, and is used if it is installed: the extra ``fast``. `mdattn bench attention` shows what
that gains: most with AVX2 alone, least with AVX-512 and long head dims. Importing it
opens 65 files, so that waits until there are numbers enough.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.devices.cpu.partial import Floats

# An ONNX model of one node, y = Exp(x), over vectors of any length; opset 17.
MODEL = (
    b'\x08\x08:4\n\x0b\n\x01x\x12\x01y"\x03Exp\x12\x01gZ\x10\n\x01x\x12\x0b\n\t\x08\x01\x12\x05\n'
    b"\x03\x12\x01nb\x10\n\x01y\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\x11"
)

FEW = 1 << 15  # numbers; with fewer, what a call of ONNX Runtime costs outweighs the gain


class Exponential(NamedTuple):
    """Replaces contiguous float32 numbers by their exp; any number of threads may call it."""

    library: str
    apply: Callable[[Floats], Any]


def numpy_exp() -> Exponential:
    """The one that is always there."""
    return Exponential(f"numpy {np.__version__}", lambda numbers: np.exp(numbers, out=numbers))


def exp(numbers: Floats) -> None:
    """Replace contiguous numbers by their exp, by the library that is faster for so many."""
    if numbers.size < FEW:
        np.exp(numbers, out=numbers)
    else:
        fastest_exp().apply(numbers)


def prepare_exp(numbers: int) -> None:
    """Load what is faster for so many numbers at once."""
    if numbers >= FEW:
        fastest_exp()


def loaded_exp() -> Exponential:
    """What computes exp so far: ONNX Runtime's if it was needed, else NumPy's."""
    return fastest_exp() if fastest_exp.cache_info().currsize else numpy_exp()


@cache
def fastest_exp() -> Exponential:
    """ONNX Runtime's where it is installed, else NumPy's."""
    try:
        return _onnxruntime_exp()
    except ImportError:
        return numpy_exp()


def _onnxruntime_exp() -> Exponential:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the caller's own
    session = onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])

    class Bound(threading.local):
        def __init__(self) -> None:
            self.io = session.io_binding()

    bound = Bound()

    def apply(numbers: Floats) -> None:
        place = ("cpu", 0, np.float32, [numbers.size], numbers.ctypes.data)
        bound.io.bind_input("x", *place)
        bound.io.bind_output("y", *place)
        session.run_with_iobinding(bound.io)

    return Exponential(f"onnxruntime {onnxruntime.__version__}", apply)
