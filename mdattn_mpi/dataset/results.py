"""What a job computed, for other programs: an output as a mapping of arrays.

Nothing is read before it is asked for, and then by `os.preadv` at its place in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mdattn_mpi.dataset.layout import AnyItem, State
from mdattn_mpi.dataset.output import Output
from mdattn_mpi.dataset.output import open_output as open_file
from mdattn_mpi.dataset.positioned import Region
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import AnyProblem, Span

Array = npt.NDArray[Any]


class ResultTensor:
    """A tensor of an item, in the file: `numpy.asarray` reads all of it, an index what it names.

    Attributes
    ----------
    shape, dtype
        As of the array that is read. Of attention, ``output`` is ``[Sq, Nq, Hv]`` in bfloat16
        (`ml_dtypes.bfloat16`) or float16, ``lse`` ``[Sq, Nq]`` in float32.

    """

    def __init__(self, item: ItemResults, name: str, region: Region) -> None:
        self._item = item
        self._name = name
        self.shape = region.shape
        self.dtype = region.dtype
        self._token_dim = region.token_dim

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self._name} of item {self._item.name!r}: {self.dtype} {list(self.shape)}>"

    def __getitem__(self, key: Any) -> Any:
        """Read what NumPy's array would give; of a range of tokens, ``x[100:200]``, only these.

        Raises
        ------
        ItemError
            The item isn't done, or the file can't be read there.

        """
        keys, at = list(key) if isinstance(key, tuple) else [key], self._token_dim
        spans = None
        if at is not None and len(keys) > at and all(map(_is_basic, keys[: at + 1])):
            tokens = range(self.shape[at])[keys[at]]
            if isinstance(tokens, int):
                span, keys[at] = Span(tokens, tokens + 1), 0
            else:
                low, high = sorted((tokens[0], tokens[-1])) if tokens else (0, -1)
                span, keys[at] = Span(low, high + 1), slice(None, None, tokens.step)
            spans = (span,)
        return self._read(spans)[tuple(keys)]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("it is in a file: reading makes a new array")
        return self.astype(self.dtype if dtype is None else dtype)

    def astype(self, dtype: npt.DTypeLike) -> Array:
        """Read all of it in another dtype, as ``x.astype("float32")``."""
        return self._read(None).astype(dtype, copy=False)

    def _read(self, spans: Sequence[Span] | None) -> Array:
        return self._item._read(self._name, spans)


def _is_basic(key: object) -> bool:
    return isinstance(key, int | np.integer | slice) and not isinstance(key, bool)


class ItemResults(Mapping[str, ResultTensor]):
    """What was computed of one item, by the tensor's name.

    Of attention these are ``output``, and ``lse`` if it was kept.

    Attributes
    ----------
    name
        The item's.
    problem
        What was to be computed.

    """

    def __init__(self, results: Results, item: AnyItem) -> None:
        self.name = item.name
        self.problem: AnyProblem = item.problem
        self._results = results
        self._item = item
        self._tensors = {
            name: ResultTensor(self, name, region)
            for name, region in results._output.regions(item).items()
        }

    @property
    def state(self) -> State:
        """``done``, ``todo`` or ``failed``, as the file says now: a job may be writing it."""
        self._results._check_open()
        return self._results._output.ledger.state(self._item)

    def __getitem__(self, name: str) -> ResultTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<item {self.name!r}: {self.problem}; {', '.join(self)}>"

    def _read(self, tensor: str, spans: Sequence[Span] | None) -> Array:
        output = self._results._output
        self._results._check_open()
        entry = output.ledger.entry(self._item)
        if entry.state != "done":
            why = f": {entry.reason}" if entry.reason else ""
            raise ItemError(
                f"{'is not done yet' if entry.state == 'todo' else 'failed'}{why}",
                fix="run the job again, or leave out items whose state isn't 'done'",
                file=output.path,
                item=self.name,
            )
        return output.read(self._item, tensor, spans)


class Results(Mapping[str, ItemResults]):
    """An open output, by the items' names, in their order in the file.

    Attributes
    ----------
    path
        The file.
    attributes
        Those of its root: provenance and options.

    """

    def __init__(self, output: Output) -> None:
        self.path = output.path
        self.attributes = output.attributes
        self._output = output
        self._closed = False
        self._items = {item.name: ItemResults(self, item) for item in output.items}

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. What was read stays; nothing more can be."""
        self._closed = True
        self._output.close()

    def __getitem__(self, name: str) -> ItemResults:
        if name not in self._items:
            raise KeyError(f"{self.path} has no item {name!r}; it has {len(self)} others")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"<output {self.path!r}: {len(self)} items>"

    def _check_open(self) -> None:
        if self._closed:
            raise RejectedError(
                "was closed before this was read",
                fix="read within the with block, as numpy.asarray(x) does",
                file=self.path,
            )


def open_output(path: str | os.PathLike[str]) -> Results:
    """Open what a job computed, for reading; a job may still be writing it.

    Parameters
    ----------
    path
        The file that ``mdattn run -o`` named.

    Returns
    -------
    Results
        A context manager, and a mapping of the items' names to what was computed of them.

    Raises
    ------
    RejectedError
        It isn't an output, it is damaged, or it can't be opened.

    """
    return Results(open_file(path))
