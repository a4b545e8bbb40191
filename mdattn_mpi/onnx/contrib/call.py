"""A node of ONNX Runtime's, about to be written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.lengths import Lengths
from mdattn_mpi.onnx.model import attribute_of, name_of
from mdattn_mpi.onnx.nodes import Nodes


@dataclass(frozen=True)
class Call:
    """A node, its inputs by the names that the operator has for them, and what comes in its place.

    `used` are the outputs that somebody reads.
    """

    node: Any
    inputs: Mapping[str, str]
    used: frozenset[str]
    nodes: Nodes
    shapes: Lengths
    opset: int

    def get(self, name: str) -> str:
        """Return the tensor of an input; empty where it is left out."""
        return self.inputs.get(name, "")

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return attribute_of(self.node, name, default)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return a shape, in which every symbol counts the same.

        Raises
        ------
        RejectedError
            It can't be inferred.

        """
        if not tensor:
            raise self.refuse("lacks an input that it must have", "export the model anew")
        if tensor not in self.shapes.shapes:
            raise self.refuse(f"takes {tensor!r}, whose shape isn't known")
        return self.shapes.shapes[tensor]

    def output(self, number: int = 0) -> str:
        """Return the name of an output; empty where nobody reads it."""
        name = self.node.output[number] if number < len(self.node.output) else ""
        return name if name in self.used else ""

    def refuse(self, why: str, fix: str = "") -> RejectedError:
        """Make the error that names the node."""
        return RejectedError(
            f"{name_of(self.node)} {why}", fix=fix or "export the model without it, or use -n 1"
        )

    def refuse_inputs(self, unknown: Mapping[str, str]) -> None:
        """Refuse the inputs that aren't understood, by what they are."""
        for name, what in unknown.items():
            if self.get(name):
                raise self.refuse(f"has {what}")

    def refuse_outputs(self, names: Mapping[int, str]) -> None:
        """Refuse outputs that can't be given and that somebody reads."""
        for number, what in names.items():
            if self.output(number):
                raise self.refuse(
                    f"gives {what}", "export the model without a cache (use_cache=False)"
                )
