"""New nodes, written one after the other, and the constants that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mdattn_mpi.onnx.model import import_onnx


class Nodes:
    """Nodes to be put into a model; their names begin with a prefix of their own.

    Attributes
    ----------
    made, constants
        The nodes in their order, and the initializers that they read.

    """

    def __init__(self, prefix: str) -> None:
        self.made: list[Any] = []
        self.constants: list[Any] = []
        self._prefix = prefix
        self._onnx = import_onnx()

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node of one output; return its name."""
        name = output or f"{self._prefix}_{kind}_{len(self.made)}"
        self.made.append(self._onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def split(self, name: str, sizes: Sequence[int]) -> list[str]:
        """Cut a tensor along its last dim."""
        given = [name, self.constant(np.array(sizes, np.int64))]
        names = [f"{self._prefix}_Split_{len(self.made)}_{n}" for n in range(len(sizes))]
        self.made.append(self._onnx.helper.make_node("Split", given, names, name=names[0], axis=-1))
        return names

    def constant(self, values: Any) -> str:
        """Write values down."""
        name = f"{self._prefix}_constant_{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(np.asarray(values), name))
        return name

    def integers(self, *values: int) -> str:
        """Write down a list of integers, as shapes and dims are."""
        return self.constant(np.array(values, np.int64))

    def reshape(self, name: str, *shape: int, output: str = "") -> str:
        """Reshape; 0 keeps a dim, -1 is what is left."""
        return self.add("Reshape", name, self.integers(*shape), output=output)

    def wide(self, name: str) -> str:
        """Turn a tensor into float32."""
        return self.add("Cast", name, to=self._onnx.TensorProto.FLOAT)

    def narrow(self, name: str, like: str, output: str = "") -> str:
        """Turn a tensor into the dtype of another."""
        return self.add("CastLike", name, like, output=output)

    def scaled(self, name: str, factor: float) -> str:
        """Multiply in float32, so that the factor isn't rounded."""
        if factor == 1.0:
            return name
        product = self.add("Mul", self.wide(name), self.constant(np.float32(factor)))
        return self.narrow(product, name)
