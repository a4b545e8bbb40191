"""Which dim of which tensor counts tokens.

Found by shape inference with two different numbers of tokens: the dim that follows is the one.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.axes import TokenDim
from mdattn_mpi.onnx.model import constant_of, graph_inputs, name_of
from mdattn_mpi.onnx.shapes import infer_shapes, labels_of

Shape = tuple[int, ...]
Probe = tuple[int, int]  # two numbers of tokens

PRIMES = [n for n in range(1009, 1300) if all(n % d for d in range(2, isqrt(n) + 1))]
OTHERS = [n for n in range(11, 200) if all(n % d for d in range(2, isqrt(n) + 1))]


class Tokens:
    """Where the tokens are in a graph.

    Attributes
    ----------
    counts
        See `counts`: of the tensors computed from the number of tokens, the kind of each element.

    """

    def __init__(
        self,
        graph: Any,  # the model's, or that of a branch
        inferred: Sequence[Any],  # the same with shapes: by probe; and with other symbols above 1
        probes: Mapping[str, Probe],
        opsets: Sequence[Any],
        outside: Tokens | None = None,
        inside: str = "",  # the node that holds it, in words
    ) -> None:
        self.opsets = opsets
        self.graph, self.inferred, self._probes = graph, inferred, probes
        self._outside, self._inside = outside, inside
        around = outside._shapes if outside else [ChainMap[str, Shape]() for _ in inferred]
        self._shapes: list[ChainMap[str, Shape]] = [
            beyond.new_child(_shapes(graph, each))
            for each, beyond in zip(inferred, around, strict=True)
        ]
        self.counts: ChainMap[str, Any] = (
            outside.counts if outside else ChainMap[str, Any]()
        ).new_child()
        self._types = {
            value.name: value.type.tensor_type.elem_type for value in _values(inferred[0])
        }

    @property
    def nested(self) -> bool:
        """Whether the graph is held by a node."""
        return self._outside is not None

    def dtype(self, tensor: str) -> int:
        """Return a tensor's element type, as ONNX counts these."""
        return int(self._types[tensor])

    def shape(self, tensor: str) -> Shape | None:
        """Return a tensor's shape at the first probe; dims that aren't known are -1."""
        return self._shapes[0].get(tensor)

    def may_stretch(self, tensor: str, dim: int) -> bool:
        """Whether a dim that counts 1 here is a symbol of the model, and may count more."""
        shape = self._shapes[2].get(tensor)
        return shape is None or (-len(shape) <= dim < len(shape) and shape[dim] != 1)

    def constant(self, tensor: str) -> Any:
        """Return the array of a constant; None for anything else."""
        found = constant_of(self.graph, tensor)
        return self._outside.constant(tensor) if found is None and self._outside else found

    def place(self, tensor: str) -> TokenDim | None:
        """Return the dim of `tensor` that counts tokens; None where none does.

        Raises
        ------
        RejectedError
            A dim depends on the number of tokens without being it.

        """
        first, second = (shapes.get(tensor) for shapes in self._shapes[:2])
        if first is None or second is None or first == second:
            return None
        pairs = list(zip(first, second, strict=True))
        follow = [(dim, pair) for dim, pair in enumerate(pairs) if pair[0] != pair[1]]
        dim, pair = follow[0]
        for sequence, probe in self._probes.items():
            if len(follow) == 1 and pair == probe:
                return TokenDim(sequence, dim)
        which = f"{tensor!r}, {self.show(tensor)}, of which no single dim counts tokens"
        node = next((node for node in self.graph.node if tensor in node.output), None)
        raise self.refuse(node, f"makes {which}") if node else self.refuse(None, f"takes {which}")

    def show(self, tensor: str) -> str:
        """Write a shape with the names of sequences for their probes."""
        names = {probe[0]: name for name, probe in self._probes.items()}
        dims = (str(names.get(dim, dim)) for dim in self.shape(tensor) or ())
        return f"[{', '.join(dims)}]"

    def branch(self, graph: Any, inferred: Sequence[Any], node: Any) -> Tokens:
        """Make the same of a graph that `node` holds."""
        inside = f" inside {name_of(node)}{self._inside}"
        return Tokens(graph, inferred, self._probes, self.opsets, self, inside)

    def refuse(self, node: Any, why: str, fix: str = "") -> RejectedError:
        """Make the error that names a node (None: the model), where it is, and why."""
        named = name_of(node) if node else "the model"
        return RejectedError(
            f"{named}{self._inside} {why}: it can't be cut into token shards",
            fix=fix or "shard the attention block alone, or use -n 1",
        )


def trace_tokens(model: Any, places: Mapping[str, Sequence[TokenDim]]) -> Tokens:
    """Find where the tokens are in a model, given the dims that count them in each input.

    Raises
    ------
    RejectedError
        The number of tokens is baked into the model.

    """
    sequences = sorted({place.sequence for each in places.values() for place in each})
    pairs = zip(PRIMES[::2], PRIMES[1::2], strict=False)
    probes = dict(zip(sequences, pairs, strict=False))
    inferred = [_infer(model, places, probes, number) for number in (0, 1)]
    stretched = _infer(model, places, probes, 0, others=OTHERS)
    return Tokens(model.graph, [*inferred, stretched], probes, list(model.opset_import))


def _infer(
    model: Any,
    places: Mapping[str, Sequence[TokenDim]],
    probes: Mapping[str, Probe],
    number: int,
    others: Sequence[int] = (),
) -> Any:
    """Infer the shapes of all tensors for one number of tokens.

    Other symbols count 1, as in an engine that is built of the model; or each one of `others`, and
    then a node that these don't fit is passed over.
    """
    lengths: dict[str, int] = {}
    dims = {value.name: labels_of(value) for value in graph_inputs(model)}
    for name, labels in dims.items():
        for place in places.get(name, ()):
            labels[place.dim] = probes[place.sequence][number]
        for dim, label in enumerate(labels):
            if isinstance(label, str):
                unused = others[len(lengths) % len(others)] if others else 1
                labels[dim] = lengths.setdefault(label, unused)
    try:
        return infer_shapes(model, dims, strict=not others)
    except RejectedError:
        if others:
            return infer_shapes(model, {})
        raise


def _values(graph: Any) -> Iterable[Any]:
    return (*graph.value_info, *graph.input, *graph.output)


def _shapes(graph: Any, inferred: Any) -> dict[str, Shape]:
    """Return the shapes of tensors by name; dims that aren't known are -1."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in _values(inferred):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
    return found
