"""Which dataset goes to which input or output of a model's engine.

``hidden=items/*/hidden:0`` binds the tensor ``hidden`` to a dataset of every item, whose dim 0
counts tokens; ``:DIM`` may be left out where the engine's manifest tells it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mdattn_mpi.errors import RejectedError

FORM = "write TENSOR=items/*/DATASET:DIM, for example hidden=items/*/hidden:0"
ITEMS, ANY = "items", "*"


@dataclass(frozen=True)
class Binding:
    """One tensor of an engine and the datasets that it stands for."""

    tensor: str
    path: str  # of the dataset, with ``*`` in place of the item
    axis: int  # the dim that counts tokens

    @property
    def name(self) -> str:
        """The dataset's name, in every item."""
        return self.path.split("/")[-1]


def parse_bindings(texts: Sequence[str], axes: Mapping[str, int]) -> tuple[Binding, ...]:
    """Read what ``--bind`` takes; `axes` has the token dims that the engine's manifest tells.

    Raises
    ------
    RejectedError
        Another form, a tensor bound twice, or a dim that isn't the manifest's.

    """
    found: dict[str, Binding] = {}
    for text in texts:
        binding = _parse(text, axes)
        if binding.tensor in found:
            raise RejectedError(f"{binding.tensor!r} is bound twice", fix="bind each tensor once")
        found[binding.tensor] = binding
    return tuple(found.values())


def _parse(text: str, axes: Mapping[str, int]) -> Binding:
    tensor, equals, rest = text.partition("=")
    path, colon, dim = rest.partition(":")
    parts = path.strip("/").split("/")
    if not equals or not tensor or len(parts) != 3 or parts[:2] != [ITEMS, ANY] or not parts[2]:
        raise RejectedError(f"--bind {text!r}", fix=FORM)
    if colon and not dim.isdecimal():
        raise RejectedError(f"--bind {text!r}: {dim!r} is no dim", fix=FORM)
    if not colon and tensor not in axes:
        raise RejectedError(f"--bind {text!r}: which dim counts tokens?", fix=FORM)
    axis = int(dim) if colon else axes[tensor]
    if axes.get(tensor, axis) != axis:
        raise RejectedError(
            f"--bind {text!r}: in {tensor!r} dim {axes[tensor]} counts tokens",
            fix=f"write {tensor}={path}:{axes[tensor]}",
        )
    return Binding(tensor, "/".join(parts), axis)


def check_bindings(
    bindings: Sequence[Binding],
    inputs: Iterable[str],
    outputs: Iterable[str],
    datasets: Iterable[str],
    *,
    file: str = "",
) -> None:
    """Hold bindings against an engine's tensors and the datasets that every item of a file has."""
    needed, given = list(inputs), list(outputs)
    bound = {binding.tensor for binding in bindings}
    there = set(datasets)
    for binding in bindings:
        if binding.tensor not in (*needed, *given):
            raise RejectedError(
                f"the engine has no input or output {binding.tensor!r}",
                fix=f"it has inputs {', '.join(needed)} and outputs {', '.join(given)}",
            )
        if binding.tensor in needed and binding.name not in there:
            raise RejectedError(
                f"{binding.path} matches nothing: no item has {binding.name!r}",
                file=file,
                fix=f"items have {', '.join(sorted(there)) or 'nothing'}",
            )
    for tensor in (*needed, *given):
        if tensor not in bound:
            raise RejectedError(f"{tensor!r} of the engine is bound to nothing", fix=FORM)
