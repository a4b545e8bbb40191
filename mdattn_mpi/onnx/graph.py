"""The graph of a model: who makes and reads a tensor; and nodes put in the place of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mdattn_mpi.onnx.model import constant_of, graph_inputs, import_onnx, operator, reads

_SAME = frozenset(["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])


class Links:
    """Who makes a tensor, and who reads it."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self._makers = {name: node for node in model.graph.node for name in node.output if name}
        self._readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in reads(node):
                self._readers.setdefault(name, []).append(node)
        self._inputs = {value.name for value in graph_inputs(model)}
        self._outputs = {value.name for value in model.graph.output}
        self._weights = {tensor.name for tensor in model.graph.initializer}

    def maker(self, tensor: str) -> Any:
        """Return the node that makes `tensor`; None for an input or a weight."""
        return self._makers.get(tensor)

    def readers(self, tensor: str) -> list[Any]:
        """List the nodes that read `tensor`."""
        return self._readers.get(tensor, [])

    def only_reader(self, tensor: str) -> Any:
        """Return the one node that reads `tensor`; None when there are more, or it is an output."""
        found = self.readers(tensor)
        return found[0] if len(found) == 1 and tensor not in self._outputs else None

    def is_weight(self, tensor: str) -> bool:
        """Whether a tensor is stored in the model."""
        maker = self.maker(tensor)
        return tensor in self._weights or (maker is not None and operator(maker) == "Constant")

    def ancestors(self, tensor: str) -> list[Any]:
        """List the nodes that `tensor` comes from, in the model's order."""
        found = {id(node) for node in self._above(tensor, {})}
        return [node for node in self.graph.node if id(node) in found]

    def sources(self, tensor: str) -> list[str]:
        """List the inputs whose values, not only lengths, `tensor` is made of."""
        nodes = self._above(tensor, {"Shape", "Size"})
        names = [tensor, *(name for node in nodes for name in reads(node))]
        return [name for name in dict.fromkeys(names) if name in self._inputs]

    def _above(self, tensor: str, beyond: Iterable[str]) -> list[Any]:
        found: dict[int, Any] = {}
        todo = [tensor]
        while todo:
            node = self._makers.get(todo.pop())
            if node is not None and id(node) not in found and operator(node) not in beyond:
                found[id(node)] = node
                todo += reads(node)
        return list(found.values())

    def is_index(self, tensor: str) -> bool:
        """Whether a tensor says which rows of a stored table are taken."""
        return bool(self.tables(tensor))

    def tables(self, tensor: str) -> list[str]:
        """List the stored tables whose rows a tensor picks."""
        found = []
        for node in self.readers(tensor):
            if operator(node) == "Gather" and node.input[1] == tensor:
                found += [name for name in node.input[:1] if self.is_weight(name)]
            elif operator(node) in _SAME:
                found += self.tables(node.output[0])
        return found

    def compared_with(self, tensor: str) -> dict[str, int]:
        """Return the constants, and their one number, that an input's values are compared with."""
        found = {}
        for node in self.readers(tensor) if tensor in self._inputs else ():
            if operator(node) == "Equal":
                (other,) = [name for name in node.input if name != tensor][:1] or [tensor]
                value = constant_of(self.graph, other)
                if value is not None and value.size == 1:
                    found[other] = int(value.reshape(()))
        return found

    def reaches_output(self, tensor: str, ends: Callable[[Any, str], bool]) -> bool:
        """Whether an output is made of the values of `tensor`, past where ``ends(node, name)``."""
        seen, todo = set(), [tensor]
        while todo:
            name = todo.pop()
            if name in self._outputs:
                return True
            for node in self.readers(name):
                if id(node) not in seen and not ends(node, name):
                    seen.add(id(node))
                    todo += node.output
        return False


class Writer:
    """Nodes in the place of those that made the same tensors; `finish` puts them in.

    Attributes
    ----------
    position_inputs
        The inputs that were added, ``[tokens]``, and the symbol of their length.

    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.position_inputs: dict[str, str] = {}
        self._onnx = import_onnx()
        self._instead: dict[str, list[Any]] = {}
        self._first: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._shapes: list[tuple[Any, str]] = []  # of Reshapes, and their constant shapes
        self._known = {tensor.name for tensor in model.graph.initializer}

    @property
    def written(self) -> list[str]:
        """Name the tensors that have new nodes."""
        return list(self._instead)

    def has(self, name: str) -> bool:
        """Whether a tensor is a constant, or has been written."""
        return name in self._instead or name in self._known or name in self._constants

    def keep(self, node: Any) -> None:
        """Leave a node as it is."""
        self._instead.update((name, [node]) for name in node.output if name)

    def constant(self, name: str, value: Any) -> None:
        """Write values down."""
        self._constants[name] = np.asarray(value)

    def reshape(self, node: Any, shape: Sequence[int]) -> None:
        """Let a Reshape take a constant shape."""
        self._shapes.append((node, self._constant(node.output[0], np.array(shape, np.int64))))

    def count(self, name: str, counted: tuple[str, int], factor: Any, rest: Any) -> None:
        """``factor · tokens + rest``, each element by itself."""
        nodes: list[Any] = []
        shape = self._shape(name, counted, factor.reshape(-1), rest.reshape(-1), nodes)
        if factor.dtype != np.int64:
            kind = self._onnx.helper.np_dtype_to_tensor_dtype(factor.dtype)
            shape = self._op(nodes, "Cast", [shape], name, to=kind)
        wanted = self._constant(name, np.array(factor.shape, np.int64))
        self._op(nodes, "Reshape", [shape, wanted], name)
        self._put(name, nodes)

    def spread(self, name: str, row: Any, counted: tuple[str, int], dim: int) -> None:
        """The same `row` for every token, which are along `dim`."""
        nodes: list[Any] = []
        factor = np.array([int(n == dim) for n in range(row.ndim)], np.int64)
        rest = np.array(row.shape, np.int64) - factor
        shape = self._shape(name, counted, factor, rest, nodes)
        self._op(nodes, "Expand", [self._constant(name, row), shape], name)
        self._put(name, nodes)

    def positions(self, name: str, source: str, start: Any, shape: Sequence[int]) -> None:
        """The positions of the tokens, counted from `start`, in its dtype."""
        nodes: list[Any] = []
        given = source
        if start != 0:
            given = self._op(nodes, "Add", [given, self._constant(name, np.int64(start))], name)
        if start.dtype != np.int64:
            kind = self._onnx.helper.np_dtype_to_tensor_dtype(start.dtype)
            given = self._op(nodes, "Cast", [given], name, to=kind)
        self._op(nodes, "Reshape", [given, self._constant(name, np.array(shape, np.int64))], name)
        self._put(name, nodes)

    def rows(self, node: Any, positions: str, dim: int) -> None:
        """Rows of the table that `node` cuts."""
        nodes: list[Any] = []
        self._op(nodes, "Gather", [node.input[0], positions], node.output[0], axis=dim)
        self._put(node.output[0], nodes)

    def position_input(self, name: str, symbol: str) -> str:
        """Give the model an input for the positions of its tokens."""
        self.position_inputs[name] = symbol
        return name

    def finish(self, gone: Callable[[Any], bool], inputs: Iterable[str]) -> None:
        """Put all of it in, and drop `inputs`, nodes that are `gone` and that nobody wrote again.

        What is left without a reader goes too.
        """
        graph, onnx = self.model.graph, self._onnx
        for node, shape in self._shapes:
            node.input[1] = shape
        nodes, seen = [], set[int]()
        made = {name for node in graph.node for name in node.output}
        late = [each for name, put in self._instead.items() if name not in made for each in put]
        for node in (*late, *graph.node):
            put = [each for name in node.output for each in self._instead.get(name, ())]
            for each in put or ([] if node not in late and gone(node) else [node]):
                if id(each) not in seen:
                    seen.add(id(each))
                    nodes.append(each)
        tensors = [onnx.numpy_helper.from_array(v, n) for n, v in self._constants.items()]
        for name, symbol in self.position_inputs.items():
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [symbol])
            graph.input.append(value)
        graph.initializer.extend(tensors)
        set_nodes(graph, (*self._first, *nodes))
        for name in inputs:
            (value,) = (each for each in graph.input if each.name == name)
            graph.input.remove(value)
        prune(graph)

    def _put(self, name: str, nodes: list[Any]) -> None:
        """Let the last node make `name`."""
        nodes[-1].output[0] = name
        self._instead[name] = nodes

    def _shape(
        self, name: str, counted: tuple[str, int], factor: Any, rest: Any, nodes: list[Any]
    ) -> str:
        """A shape ``factor · tokens + rest``, with constants where the tokens have no part."""
        parts = []
        for times, more in zip(factor, rest, strict=True):
            part = self._constant(name, np.array([more], np.int64))
            if times:
                tokens = self._tokens(counted)
                if times != 1:
                    each = self._constant(name, np.array([times], np.int64))
                    tokens = self._op(nodes, "Mul", [tokens, each], name)
                part = self._op(nodes, "Add", [tokens, part], name) if more else tokens
            parts.append(part)
        return self._op(nodes, "Concat", parts, name, axis=0)

    def _tokens(self, counted: tuple[str, int]) -> str:
        """Count the tokens of an input: one number, made once."""
        source, dim = counted
        name = f"mdattn_{source}_{dim}_tokens"
        if not any(name in node.output for node in self._first):
            shape = self._op(self._first, "Shape", [source], name)
            index = self._constant(name, np.array([dim], np.int64))
            self._op(self._first, "Gather", [shape, index], name, axis=0)
            self._first[-1].output[0] = name
        return name

    def _constant(self, prefix: str, value: Any) -> str:
        name = f"{prefix}_mdattn_{len(self._constants)}"
        self._constants[name] = np.asarray(value)
        return name

    def _op(
        self, nodes: list[Any], kind: str, inputs: Sequence[str], prefix: str, **attributes: Any
    ) -> str:
        name = f"{prefix}_mdattn_{kind}_{len(nodes)}"
        nodes.append(self._onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name


def set_nodes(graph: Any, nodes: Iterable[Any]) -> None:
    """Let a graph have `nodes` and no others; some may be its own, which protobuf would drop."""
    copies = [import_onnx().NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def prune(graph: Any) -> None:
    """Drop the nodes that no output needs, and the constants that no node reads."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(reads(node))
    set_nodes(graph, reversed(kept))
    for tensor in [each for each in graph.initializer if each.name not in needed]:
        graph.initializer.remove(tensor)
