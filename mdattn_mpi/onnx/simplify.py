"""Put in the place of what an exporter computed from lengths what a shard can compute too.

Positions, tables of them, masks and shapes depend on nothing but the number of tokens, which on a
shard is another. Each one that the rest of the model reads is known by its values at several
lengths, and becomes a constant, a shape made of the shard's own length, a mask that attention has
by itself, or a function of ``token_positions``, an input that every rank gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx import masks
from mdattn_mpi.onnx.axes import TokenDim, at_lengths
from mdattn_mpi.onnx.faults import Faults
from mdattn_mpi.onnx.forms import (
    Constant,
    Count,
    Form,
    Numbers,
    Spread,
    form_of,
    has_form,
)
from mdattn_mpi.onnx.graph import Links, Writer
from mdattn_mpi.onnx.lengths import LARGEST, Lengths
from mdattn_mpi.onnx.model import ATTENTION, graph_inputs, import_onnx, name_of, operator, reads
from mdattn_mpi.onnx.sharding import POSITIONS

SHAPES = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}  # where a node takes a shape
PROBES = (41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89)  # lengths that no fixed dim has
SMALL = 1 << 12  # elements of a constant that is written down rather than computed
ONE_LENGTH = "is of one number of tokens only"  # what a mask is that was stored
WITHOUT = "export the model without it, or use -n 1"

Places = Mapping[str, Sequence[TokenDim]]


class Along(NamedTuple):
    """The dim of a tensor that follows the tokens of a sequence."""

    sequence: str
    dim: int


def simplify(model: Any, places: Places, faults: Faults) -> tuple[list[str], Places]:
    """Rewrite `model` in place, whose attentions are single nodes.

    Return what was done, in words, and where the tokens are in the inputs that were added.

    `places` are the dims of its inputs that count tokens. What can't be rewritten is added to
    `faults`, and left as it is.
    """
    work = _Simplifier(model, places, faults)
    work.drop_masks()
    work.rewrite()
    return work.done, {
        name: [TokenDim(work.sequences[0] if len(work.sequences) == 1 else symbol, 0)]
        for name, symbol in work.writer.position_inputs.items()
    }


class _Simplifier:
    def __init__(self, model: Any, places: Places, faults: Faults) -> None:
        self.model, self.places, self.faults = model, places, faults
        self.sequences = sorted({place.sequence for each in places.values() for place in each})
        self.links = Links(model)
        self.done: list[str] = []
        self.padding = self._padding_masks()
        count = len(self.sequences)
        self.lengths = [
            dict(zip(self.sequences, PROBES[number * count :], strict=False)) for number in range(3)
        ]
        self.probes = [self._probe(each) for each in self.lengths]
        self.writer = Writer(model)
        self.forms: dict[str, Form | None] = {}

    # Masks

    def _padding_masks(self) -> list[str]:
        """Name the inputs that say which keys there are: the mask of an attention reads them."""
        found: dict[str, None] = {}
        inputs = {
            value.name: value.type.tensor_type.elem_type for value in graph_inputs(self.model)
        }
        types = import_onnx().TensorProto
        whole = (types.INT64, types.INT32, types.BOOL)
        for node in self._masked():
            for name in self.links.sources(node.input[3]):
                if inputs.get(name) in whole and len(self.places.get(name, ())) == 1:
                    found[name] = None
        return [name for name in found if self._is_padding(name)]

    def _is_padding(self, name: str) -> bool:
        """Whether an input is nothing but a mask: by its name, or nothing else is made of it."""
        masked = {node.output[0]: node.input[3] for node in self._masked()}

        def ends(node: Any, tensor: str) -> bool:
            return operator(node) in ("Shape", "Size") or masked.get(node.output[0]) == tensor

        named = "mask" in name.lower()
        return not self.links.is_index(name) and (
            named or not self.links.reaches_output(name, ends)
        )

    def _masked(self) -> list[Any]:
        return [
            node
            for node in self.model.graph.node
            if operator(node) in ATTENTION and len(node.input) > 3 and node.input[3]
        ]

    def _probe(
        self,
        lengths: Mapping[str, int],
        positions: Any = None,
        only: Any = None,
        largest: int | None = None,
    ) -> Lengths:
        """Look at the model at some lengths; no key is padding."""
        dims = at_lengths(self.model, self.places, lengths)
        types = {value.name: value.type.tensor_type.elem_type for value in graph_inputs(self.model)}
        kind = import_onnx().helper.tensor_dtype_to_np_dtype
        given = {name: np.ones(dims[name], kind(types[name])) for name in self.padding}
        return Lengths(self.model, dims, given, positions, only, largest)

    def drop_masks(self) -> None:
        """Make attributes of the masks that are made of lengths."""
        known: dict[str, masks.Mask | str] = {}
        for node in self._masked():
            name = node.input[3]
            if name not in self.probes[0].values:
                inputs = ", ".join(map(repr, self.links.sources(name))) or "weights"
                self._fault(node, f"has a mask that is made of {inputs}")
                continue
            if name not in known:
                known[name] = self._mask(name)
            mask = known[name]
            if isinstance(mask, str):
                dynamic = "export the model with a dynamic number of tokens"
                fix = dynamic if mask == ONE_LENGTH else WITHOUT
                self._fault(node, f"has a mask that {mask}", fix)
                continue
            masks.set_mask(node, masks.narrowed(node, mask))
            self.done.append(f"{name_of(node)}: its mask is an attribute now: {mask}")
        if self.padding:
            names = ", ".join(map(repr, self.padding))
            self.done.append(f"{names}: taken as all ones; sequences must have no padding")

    def _mask(self, name: str) -> masks.Mask | str:
        """Tell which mask a tensor is, or why that can't be told.

        It is looked at for more tokens than any number in its arithmetic, and, where positions can
        be put in, for a few that are far apart.
        """
        nodes = self.links.ancestors(name)
        values = self.probes[0].values
        valued = [node for node in nodes if node.output[0] in values]
        bounds, tables = masks.numbers_in(valued, values, self.links.is_weight)
        largest = max(masks.FEWEST, *bounds, 0) + 3

        def look(tokens: int, positions: Any = None) -> masks.Mask | str:
            lengths = {each: tokens + number for number, each in enumerate(self.sequences)}
            found = self._probe(lengths, positions, nodes).values.get(name)
            if found is None or found.ndim < 2 or not found.size:
                return "can't be computed for every number of tokens"
            if len(self.sequences) == 1 and found.shape[-1] not in (1, tokens):
                return ONE_LENGTH
            return masks.mask_from_values(found, positions)

        dense = look(min([largest, masks.MOST, *tables]))
        if isinstance(dense, str) or len(self.sequences) > 1:
            return dense
        spread = masks.sparse_positions(bounds)
        sparse = look(len(spread), spread)
        if largest <= masks.MOST or tables:
            return sparse if isinstance(sparse, masks.Mask) else dense
        if isinstance(sparse, str):
            return f"has the number {largest - 3} in it, and can't be told for so many tokens"
        return sparse

    # What else is made of lengths

    def rewrite(self) -> None:
        """Let every tensor that is made of lengths, and that others read, be right on a shard."""
        for node in self.model.graph.node:
            if not self._is_valued(node) and self.faults.tensors.isdisjoint(node.output):
                for name in reads(node):
                    if name in self.probes[0].values:
                        self._take(node, name)
        for value in self.model.graph.output:
            if value.name in self.probes[0].values:
                why = f"gives {value.name!r}, computed from the number of tokens"
                self.faults.add(self._refuse(None, why))
        self.writer.finish(self._is_valued, self.padding)
        self._verify()

    def _is_valued(self, node: Any) -> bool:
        return all(name in self.probes[0].values for name in node.output if name)

    def _take(self, node: Any, name: str) -> None:
        """Let `node` read `name`, which is made of lengths."""
        kind = operator(node)
        number = list(node.input).index(name) if name in node.input else -1
        try:
            form = self._form(name, node)
            if not isinstance(form, Count):
                self._keep(name, form, node)
            elif kind == "Slice" and (along := self._along(node.output[0])):
                if not self._number_rows(node, along):
                    self._refuse_count(node)
            elif SHAPES.get(kind) != number:
                self._refuse_count(node)
            elif kind == "Reshape" and (shape := _open_shape(form)):
                self.writer.reshape(node, shape)
            else:
                self._keep(name, form, node)
        except RejectedError as error:
            self.faults.add(error, node.output)

    def _form(self, name: str, reader: Any) -> Form | None:
        """Find the form of a tensor, and make sure of it far beyond the probes."""
        if name in self.forms:
            return self.forms[name]
        values = [probe.values[name] for probe in self.probes]
        form = form_of(values, self.lengths, self._along(name))
        nodes = self.links.ancestors(name)
        if form and any(operator(node) in ("Shape", "Size") for node in nodes):
            valued = [node for node in nodes if node.output[0] in self.probes[0].values]
            bounds, tables = masks.numbers_in(valued, self.probes[0].values, self.links.is_weight)
            tokens = min([max(masks.FEWEST, *bounds, 0) + 3, *tables])
            far = {each: tokens + number for number, each in enumerate(self.sequences)}
            found = self._probe(far, None, nodes, LARGEST).values.get(name)
            if not has_form(form, found, far):
                raise self._refuse(
                    reader,
                    f"reads {name!r}, which depends on the number of tokens in an unknown way "
                    f"(seen at {tokens} tokens)",
                )
        self.forms[name] = form
        return form

    def _along(self, name: str) -> Along | None:
        """Return the one dim of a tensor that follows a sequence; None where none or several do."""
        shapes = [probe.shapes.get(name) for probe in self.probes]
        if None in shapes or len({len(shape or ()) for shape in shapes}) > 1:
            return None
        dims = list(zip(*(shape or () for shape in shapes), strict=True))
        follow = [(dim, sizes) for dim, sizes in enumerate(dims) if len(set(sizes)) > 1]
        for sequence in self.sequences:
            own = tuple(lengths[sequence] for lengths in self.lengths)
            if len(follow) == 1 and follow[0][1] == own:
                return Along(sequence, follow[0][0])
        return None

    def _keep(self, name: str, form: Form | None, reader: Any) -> None:
        """Have `name` made by nodes that do on a shard what they did on the whole."""
        if self.writer.has(name):
            return
        maker, along = self.links.maker(name), self._along(name)
        if isinstance(form, Constant):
            if maker is None or form.value.size <= SMALL or not self._keep_maker(maker):
                self.writer.constant(name, form.value)
        elif isinstance(form, Count):
            self.writer.count(name, self._counted(form.sequence), form.factor, form.rest)
        elif isinstance(form, Spread):
            self.writer.spread(name, form.row, self._counted(form.sequence), form.dim)
        elif isinstance(form, Numbers):
            source = self._positions(form.sequence)
            self.writer.positions(name, source, form.start, form.shape)
        elif along is None:
            if len({probe.values[name].shape for probe in self.probes}) == 1:
                self._refuse_count(reader)
            raise self._refuse(
                reader,
                f"reads {name!r}, made of lengths alone, of which no single dim counts tokens",
            )
        elif maker is None:
            raise self._refuse(reader, f"reads {name!r}, which isn't the same for every token")
        elif operator(maker) != "Slice" or not self._number_rows(maker, along):
            self.writer.keep(maker)
            for each in reads(maker):
                self._take(maker, each)

    def _keep_maker(self, maker: Any) -> bool:
        """Leave a constant to be computed, unless it is made of what follows the tokens."""
        forms = {name: self._form(name, maker) for name in reads(maker)}
        if not all(isinstance(form, Constant) for form in forms.values()):
            return False
        self.writer.keep(maker)
        for name, form in forms.items():
            self._keep(name, form, maker)
        return True

    def _counted(self, sequence: str) -> tuple[str, int]:
        """Return an input, and its dim that counts the tokens of a sequence."""
        return next(
            (name, place.dim)
            for name, each in self.places.items()
            for place in each
            if place.sequence == sequence and name not in self.padding
        )

    def _number_rows(self, node: Any, along: Along) -> bool:
        """Look up by position what a Slice takes from the beginning of a table."""
        table, starts = node.input[0], self.probes[0].values.get(node.input[1])
        shape = self.probes[0].shapes.get(table)
        given = list(node.input[3:4])
        axes = self.probes[0].values.get(given[0]) if given and given[0] else None
        if shape is None or starts is None or self._along(table) is not None:
            return False
        dims = range(len(starts)) if axes is None else [int(n) % len(shape) for n in axes]
        if list(dims) != [along.dim] or starts[0] != 0:
            return False
        if table in self.probes[0].values:
            self._keep(table, self._form(table, node), node)
        self.writer.rows(node, self._positions(along.sequence), along.dim)
        return True

    def _positions(self, sequence: str) -> str:
        several = len(self.sequences) > 1
        return self.writer.position_input(
            f"{POSITIONS}_{sequence}" if several else POSITIONS, sequence if several else "tokens"
        )

    def _verify(self) -> None:
        """Make sure that the nodes written give, for some positions, those rows of the whole."""
        first, count = 7, 11
        given = {
            name: np.arange(first, first + count, dtype=np.int64)
            for name in self.writer.position_inputs
        }
        dims = at_lengths(self.model, self.places, dict.fromkeys(self.sequences, count))
        shard = Lengths(self.model, {**dims, **{n: [count] for n in given}}, given)
        for name in self.writer.written:
            along = self._along(name)
            found = shard.values.get(name)
            if along is None or found is None:
                continue
            wanted = np.take(self.probes[0].values[name], range(first, first + count), along.dim)
            if found.shape != wanted.shape or not np.allclose(found, wanted, 1e-5, 1e-5, True):
                maker = self.links.maker(name)
                error = self._refuse(maker, f"makes {name!r}, which numbers tokens in its own way")
                self.faults.add(error, [name])

    def _refuse_count(self, node: Any) -> None:
        raise self._refuse(
            node, "uses the number of tokens as a value, and a rank would use that of its shard"
        )

    def _refuse(self, node: Any, why: str) -> RejectedError:
        named = name_of(node) if node is not None else "the model"
        return RejectedError(
            f"{named} {why}: it can't be cut into token shards",
            fix="make it an input of the model, cut like the tokens; or use -n 1",
        )

    def _fault(self, node: Any, why: str, fix: str = WITHOUT) -> None:
        self.faults.add(RejectedError(f"{name_of(node)} {why}", fix=fix), node.output)


def _open_shape(count: Count) -> list[int]:
    """Return a shape with -1 for the one element that follows the tokens; else nothing."""
    follows = count.factor != 0
    if follows.sum() != 1 or (count.rest[~follows] < 1).any():
        return []
    return [-1 if each else int(size) for each, size in zip(follows, count.rest, strict=True)]
