"""Which dim of which tensor counts tokens.

Found by the shapes at two different numbers of tokens: the dim that follows is the one.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.axes import PRIMES, TokenDim, at_lengths
from mdattn_mpi.onnx.lengths import Lengths
from mdattn_mpi.onnx.model import constant_of, name_of

Shape = tuple[int, ...]
Probe = tuple[int, int]  # two numbers of tokens

PROBES = [n for n in range(307, 600) if all(n % d for d in range(2, isqrt(n) + 1))]


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
        traced: Sequence[Lengths],  # at both probes; and with other symbols above 1
        probes: Mapping[str, Probe],
        opsets: Sequence[Any],
        outside: Tokens | None = None,
        inside: str = "",  # the node that holds it, in words
    ) -> None:
        self.opsets = opsets
        self.graph, self._traced, self._probes = graph, traced, probes
        self._outside, self._inside = outside, inside
        self._shapes = [each.shapes for each in traced]
        self.counts: ChainMap[str, Any] = (
            outside.counts if outside else ChainMap[str, Any]()
        ).new_child()

    @property
    def nested(self) -> bool:
        """Whether the graph is held by a node."""
        return self._outside is not None

    def dtype(self, tensor: str) -> int:
        """Return a tensor's element type, as ONNX counts these."""
        return self._traced[0].types[tensor]

    def shape(self, tensor: str) -> Shape | None:
        """Return a tensor's shape at the first probe; None where it can't be known."""
        return self._shapes[0].get(tensor)

    def failure(self, tensor: str) -> str:
        """Say why a tensor has no shape, as far as that is known."""
        return next(filter(None, (each.failures.get(tensor) for each in self._traced[:2])), "")

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

    def follows(self, tensor: str) -> bool:
        """Whether a tensor has at most one dim that depends on the number of tokens, and is it."""
        try:
            self.place(tensor)
        except RejectedError:
            return False
        return True

    def show(self, tensor: str) -> str:
        """Write a shape with the names of sequences for their probes."""
        names = {probe[0]: name for name, probe in self._probes.items()}
        dims = (str(names.get(dim, dim)) for dim in self.shape(tensor) or ())
        return f"[{', '.join(dims)}]"

    def branch(self, graph: Any, attribute: str, node: Any) -> Tokens:
        """Make the same of a graph that `node` holds."""
        inside = f" inside {name_of(node)}{self._inside}"
        traced = [each.branch(node, attribute) for each in self._traced]
        return Tokens(graph, traced, self._probes, self.opsets, self, inside)

    def refuse(self, node: Any, why: str, fix: str = "") -> RejectedError:
        """Make the error that names a node (None: the model), where it is, and why."""
        named = name_of(node) if node else "the model"
        return RejectedError(
            f"{named}{self._inside} {why}: it can't be cut into token shards",
            fix=fix or "shard the attention block alone, or use -n 1",
        )


def trace_tokens(model: Any, places: Mapping[str, Sequence[TokenDim]]) -> Tokens:
    """Find where the tokens are in a model, given the dims that count them in each input."""
    sequences = sorted({place.sequence for each in places.values() for place in each})
    pairs = zip(PROBES[::2], PROBES[1::2], strict=False)
    probes = dict(zip(sequences, pairs, strict=False))
    first, second = ({name: pair[n] for name, pair in probes.items()} for n in (0, 1))
    dims = [
        at_lengths(model, places, first),
        at_lengths(model, places, second),
        at_lengths(model, places, first, others=PRIMES),
    ]
    traced = [Lengths(model, each) for each in dims]
    return Tokens(model.graph, traced, probes, list(model.opset_import))
