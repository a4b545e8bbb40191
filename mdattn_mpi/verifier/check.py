"""One output against its dataset: every item that is done, number by number, and row by row."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from mdattn_mpi.dataset import Dataset, Entry, Item, ModelItem, Output, open_dataset
from mdattn_mpi.dataset.index import select_items
from mdattn_mpi.errors import ItemError, OutputError, RejectedError
from mdattn_mpi.verifier.compare import Array, Judgement, Place, Source, choose_rows, judge
from mdattn_mpi.verifier.survey import Survey, survey
from mdattn_mpi.verifier.tolerance import rounding_of

Verdict = Literal["right", "wrong", "not judged", "by checksum", "unfinished"]


class Cells(NamedTuple):
    """What a table says of an item; nothing but rows where nothing could be judged."""

    rows: int
    error: float
    allowed: float
    used: float
    judged: bool = True


@dataclass(frozen=True)
class ItemReport:
    """What was found out about one item."""

    item: Item
    entry: Entry
    judgement: Judgement | None = None  # None when it isn't done
    survey: Survey | None = None  # likewise
    fault: str = ""  # why it can't be read

    @property
    def verdict(self) -> Verdict:
        """The verdict, in a word or two."""
        if self.fault:
            return "wrong"
        if self.judgement is None or self.survey is None:
            return "unfinished"
        if self.bad_shards or self.survey.impossible or not self.judgement.right:
            return "wrong"
        return "right" if self.judgement.judged else "not judged"

    @property
    def cells(self) -> Cells | None:
        """What a table says of it; None when it isn't done."""
        found = self.judgement
        if found is None:
            return None
        used = max(found.used, found.lse_used or 0.0)
        return Cells(found.rows, found.error, found.tolerance, used, found.judged)

    @property
    def bad_shards(self) -> tuple[int, ...]:
        """Ranks whose bytes don't match the ledger's checksum."""
        found = self.survey.crc32s if self.survey else ()
        return tuple(rank for rank, crc32 in enumerate(found) if crc32 != self.entry.crc32s[rank])

    def owner(self, row: int) -> int:
        """The rank that wrote a query row."""
        shards = enumerate(self.entry.shards)
        return next(r for r, spans in shards for span in spans if span.start <= row < span.stop)

    def complaints(self) -> Iterator[str]:
        """Say what is wrong, one sentence each."""
        found, survey = self.judgement, self.survey
        if found is None or survey is None:
            failed = f"failed: {self.entry.reason}" if self.entry.reason else ""
            yield self.fault or failed or "has not been computed"
            return
        for rank in self.bad_shards:
            yield f"the shard of rank {rank} has other bytes than that rank wrote"
        for impossible, what in (
            (survey.outputs, "beyond the values that it sees"),
            (survey.lses, "no log-sum-exp of what it sees"),
        ):
            if impossible.first:
                yield (
                    f"{self._place(impossible.first)}: not finite, or {what}; rows × heads "
                    f"of this kind: {impossible.count}"
                )
        if found.used > 1 and found.worst:
            yield (
                f"{self._place(found.worst)}: error {found.error:.2g}, {found.used:.3g} times "
                f"what is allowed"
            )
        if (found.lse_used or 0) > 1 and found.lse_worst:
            yield (
                f"{self._place(found.lse_worst)}: the log-sum-exp's error is "
                f"{found.lse_used:.3g} times what is allowed"
            )
        if found.not_judged:
            yield (
                f"{found.not_judged} of {found.compared} rows × heads not judged: their input is "
                "not finite"
            )

    def _place(self, place: Place) -> str:
        return f"row {place.row} of head {place.head} (rank {self.owner(place.row)})"

    def to_json(self) -> dict[str, Any]:
        """The same as plain numbers and text; what isn't finite as None."""
        found = self.judgement
        facts: dict[str, Any] = {
            "item": self.item.name,
            "problem": str(self.item.problem),
            "state": self.entry.state,
            "verdict": self.verdict,
            "complaints": list(self.complaints()),
        }
        if found is not None and self.survey is not None:
            facts |= {
                "strategy": self.entry.strategy,
                "ranks": self.entry.ranks,
                "rows": found.rows,
                "error": _plain(found.error),
                "tolerance": found.tolerance,
                "used": _plain(found.used),
                "lse_used": _plain(found.lse_used),
                "wrong": found.wrong,
                "not_judged": found.not_judged,
                "impossible": self.survey.impossible,
                "bad_shards": list(self.bad_shards),
            }
        return facts


def open_input(
    output: Output, path: str, *, allow: Sequence[str], ignore: Sequence[str] = (), other: bool
) -> Dataset:
    """Open the dataset that `output` was made from, as the job did.

    Raises
    ------
    RejectedError
        It can't be opened, or it is another one; with `other` its content may differ.

    """
    if any(isinstance(item, ModelItem) for item in output.items):
        raise RejectedError(
            "holds what a model gave",
            fix="name the model: --model DIR"
            if "model" in output.attributes
            else "look for damage with `mdattn inspect --check`: engines can't be verified",
            file=output.path,
        )
    dataset = open_dataset(
        path,
        select=str(output.attributes.get("items", "*")),
        layout=str(output.attributes.get("layout", "auto")),
        allow=allow,
        ignore=(*ignore, *str(output.attributes.get("ignore", "")).split(",")),
    )
    recorded = output.attributes.get("input_digest")
    if recorded is not None and recorded != dataset.digest and not other:
        dataset.close()
        raise RejectedError(
            f"is not the dataset that {output.path} was made from: its content differs",
            fix=f"name {output.attributes.get('input_path', 'the other one')}; "
            "--other-data compares all the same",
            file=path,
        )
    return dataset


def pair(output: Output, dataset: Dataset, patterns: str) -> list[tuple[Item, Item]]:
    """Find the items of both files that `patterns` select: ``(of the output, of the dataset)``.

    Raises
    ------
    RejectedError
        Nothing matches, or an item isn't in the dataset, or is another problem there.

    """
    items = [item for item in output.items if isinstance(item, Item)]
    chosen = select_items(items, patterns, output.path)
    inputs = {item.name: item for item in dataset.items}
    for item in chosen:
        other = inputs.get(item.name)
        if other is None or other.problem != item.problem:
            found = f"holds {other.problem}" if other else "has no such item"
            raise RejectedError(
                f"{output.path} was made for {item.problem}; this dataset {found}",
                fix="name the dataset that it was made from",
                file=dataset.path,
                item=item.name,
            )
    return [(item, inputs[item.name]) for item in chosen]


@dataclass(frozen=True)
class Options:
    """What to look at, and how strictly.

    ``rows`` are those drawn at random, beside the telling ones; None means all. ``backend`` is what
    computed the output; None means the one that it names.
    """

    rows: int | None = 64
    seed: int = 0
    backend: str | None = None


def check(
    output: Output, dataset: Dataset, items: tuple[Item, Item], options: Options
) -> ItemReport:
    """Verify one item, given as the output and as the dataset number it."""
    item, given = items
    entry = output.ledger.entry(item)
    if entry.state != "done":
        return ItemReport(item, entry)
    source = Source(
        item.problem,
        lambda tensor, spans: dataset.read(given, tensor, spans),
        lambda result, spans: output.read(item, result, spans),
        output.lse,
    )
    backend = options.backend or str(output.attributes.get("backend", ""))
    try:
        seen = survey(source, entry.shards)
        found = judge(source, _rows(item, entry, options), rounding_of(backend))
    except (ItemError, OutputError) as error:
        return ItemReport(item, entry, fault=str(error))
    return ItemReport(item, entry, found, seen)


def _rows(item: Item, entry: Entry, options: Options) -> Array:
    if options.rows is None:
        return np.arange(item.problem.q_tokens)
    borders = [span.start for span in chain(*entry.shards)]
    seed = (options.seed, zlib.crc32(item.name.encode()))
    return choose_rows(item.problem, borders, options.rows, seed)


def _plain(number: float | None) -> float | None:
    return number if number is not None and np.isfinite(number) else None
