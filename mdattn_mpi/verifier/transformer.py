"""What a model gave, against the same model in one process with its own eager attention.

The model is loaded twice: in float32, which counts as right, and in the output's dtype, whose
error says how much rounding there is. Documents of a packed sequence are run one by one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mdattn_mpi.dataset import Entry, ModelItem, Output, TokenFile, open_tokens
from mdattn_mpi.dataset.index import select_items
from mdattn_mpi.errors import ItemError, OutputError, RejectedError
from mdattn_mpi.models.folder import ModelFolder, open_folder
from mdattn_mpi.models.load import load
from mdattn_mpi.problem import DTYPES, Span
from mdattn_mpi.verifier.check import Cells, Verdict

Array = NDArray[Any]

HIDDEN, EMBEDDING, LOGPROBS = "last_hidden_state", "embedding", "logprobs"
OVERALL = 3.0  # times the rounding error of one process, root mean square over all rows
WORST = 4.0  # times its largest, at one row
TELLING = 0.3  # allowed relative errors beyond this tell nothing: those of zeros are 1
SUMS = 1e-5  # of a sum over float32 numbers, relative to what was summed
PROBE = 64  # tokens that show whether a model is causal


@dataclass(frozen=True)
class Extent:
    """How much is compared.

    ``items`` drawn at random, None means all; at most so many ``tokens`` of each, and of a
    document; ``device`` is PyTorch's name of where the model runs.
    """

    items: int | None = 16
    tokens: int = 2048
    seed: int = 0
    device: str = "cpu"


class Document(NamedTuple):
    """Part of a sequence that is run alone: from its first token on, maybe not to its end."""

    number: int
    start: int
    stop: int
    whole: bool


@dataclass
class Errors:
    """Relative errors of one tensor's rows: what was found, and what rounding alone makes."""

    found: list[float] = field(default_factory=list)
    rounding: list[float] = field(default_factory=list)


class Measures(NamedTuple):
    """The stricter of two measures: over all rows, and at the worst."""

    error: float
    allowed: float

    @property
    def used(self) -> float:
        """The share of what is allowed: right is at most 1."""
        return self.error / self.allowed if np.isfinite(self.error) else np.inf


@dataclass
class ModelReport:
    """What was found out about one item."""

    item: ModelItem
    entry: Entry
    errors: dict[str, Errors] = field(default_factory=dict)
    measures: dict[str, Measures] = field(default_factory=dict)
    rows: int = 0  # tokens that were compared
    ranks: int = 0  # whose tokens these are
    drawn: bool = False
    bad_shards: tuple[int, ...] = ()
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """What it comes to."""
        if self.entry.state != "done":
            return "unfinished"
        wrong = any(found.used > 1 for found in self.measures.values())
        if self.faults or self.bad_shards or wrong:
            return "wrong"
        if not self.drawn:
            return "by checksum"
        return "right" if self.rows and self.measures else "not judged"

    @property
    def cells(self) -> Cells | None:
        """What a table says of it: of the tensor that uses most of what it is allowed."""
        if not self.measures:
            return None
        worst = max(self.measures.values(), key=lambda found: found.used)
        return Cells(self.rows, worst.error, worst.allowed, worst.used)

    def complaints(self) -> Iterator[str]:
        """Say what is wrong, or couldn't be compared, one sentence each."""
        if self.entry.state != "done":
            yield f"failed: {self.entry.reason}" if self.entry.reason else "has not been computed"
            return
        for rank in self.bad_shards:
            yield f"the shard of rank {rank} has other bytes than that rank wrote"
        yield from self.faults
        for name, found in self.measures.items():
            if found.used > 1:
                yield f"{name}: error {found.error:.2g}, {found.used:.3g} times what is allowed"
        yield from self.notes

    def to_json(self) -> dict[str, Any]:
        """The same as plain numbers and text."""
        return {
            "item": self.item.name,
            "problem": str(self.item.problem),
            "state": self.entry.state,
            "verdict": self.verdict,
            "complaints": list(self.complaints()),
            "tokens": self.rows,
            "ranks": self.ranks,
            "errors": {name: found._asdict() for name, found in self.measures.items()},
            "bad_shards": list(self.bad_shards),
        }


class OneProcess:
    """A model, run whole in this process."""

    def __init__(self, folder: ModelFolder, dtype: str, device: str, *, head: bool) -> None:
        self._model: Any = load(folder, dtype, device, "eager", head=head)  # type: ignore[arg-type]
        self._model.config.get_text_config().use_cache = False
        self._head = head
        self._device = device

    def run(self, ids: Array) -> dict[str, Array]:
        """Return hidden states ``[S, D]`` and, with a head, log-probabilities ``[S]``; float64."""
        import torch

        kept: list[Any] = []
        backbone = self._model.base_model if self._head else self._model
        hook = backbone.register_forward_hook(lambda *about: kept.append(about[-1][0]))
        try:
            with torch.inference_mode():
                tensor = torch.from_numpy(ids).to(self._device)[None]
                given = self._model(input_ids=tensor)
                found = {HIDDEN: _numpy(kept[0][0])}
                if self._head:
                    logits = given.logits[0, :-1].float()
                    chosen = logits.log_softmax(-1).gather(1, tensor[0, 1:, None])[:, 0]
                    found[LOGPROBS] = np.concatenate([[0.0], _numpy(chosen)])
        finally:
            hook.remove()
        return found


def _numpy(tensor: Any) -> Array:
    found: Array = tensor.double().cpu().numpy()
    return found


def verify(
    output: Output,
    data: str,
    model: str,
    patterns: str,
    extent: Extent,
    *,
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
    other: bool = False,
) -> list[ModelReport]:
    """Compare what is done in an output with what the model in the folder `model` gives.

    Raises
    ------
    RejectedError
        The files can't be used, or (unless `other`) aren't those that the output was made from.

    """
    folder = open_folder(model)
    attributes = output.attributes
    if "model" not in attributes:
        raise RejectedError("was made without a model", fix="leave --model out", file=output.path)
    if attributes["model"] != folder.digest and not other:
        raise RejectedError(
            f"is not the model that {output.path} was made with: config or weights differ",
            fix="name that one; --other-data compares all the same",
            file=model,
        )
    select = str(attributes.get("items", "*"))
    with open_tokens(data, select=select, allow=allow, ignore=ignore) as dataset:
        if attributes.get("input_digest") != dataset.digest and not other:
            raise RejectedError(
                f"is not the file that {output.path} was made from: its content differs",
                fix=f"name {attributes.get('input_path')}; --other-data compares all the same",
                file=data,
            )
        verifier = _Verifier(output, dataset, folder, extent)
        return verifier.reports(select_items(output.items, patterns, output.path))


class _Verifier:
    """An output, its input, and the model in two precisions."""

    def __init__(
        self, output: Output, dataset: TokenFile, folder: ModelFolder, extent: Extent
    ) -> None:
        self._output = output
        self._dataset = dataset
        self._inputs = {item.name: item for item in dataset.items}
        self._extent = extent
        self._pool = str(output.attributes.get("pool", "mean"))
        head = LOGPROBS in str(output.attributes.get("give", ""))
        dtype = DTYPES[str(output.attributes.get("dtype"))]
        self._exact = OneProcess(folder, "float32", extent.device, head=head)
        self._rounded = OneProcess(folder, dtype, extent.device, head=head)
        self._causal: bool | None = None

    def reports(self, items: Sequence[Any]) -> list[ModelReport]:
        """Look at all items' bytes, and compare the numbers of some."""
        reports = [self._look(item) for item in items]
        done = [report for report in reports if report.entry.state == "done"]
        count = len(done) if self._extent.items is None else min(len(done), self._extent.items)
        draw = np.random.default_rng(self._extent.seed)
        drawn = [done[at] for at in sorted(draw.choice(len(done), count, replace=False))]
        for report in drawn:
            report.drawn = True
            try:
                self._compare(report)
            except (ItemError, OutputError) as error:
                report.faults.append(str(error))
        _judge(drawn)
        return reports

    def _look(self, item: ModelItem) -> ModelReport:
        report = ModelReport(item, self._output.ledger.entry(item))
        if report.entry.state != "done":
            return report
        try:
            report.bad_shards = self._output.damaged(item)
            report.faults += self._wrong_sums(item)
        except (ItemError, OutputError) as error:
            report.faults.append(str(error))
        return report

    def _wrong_sums(self, item: ModelItem) -> Iterator[str]:
        """Compare sum and perplexity with the log-probabilities beside them."""
        if LOGPROBS not in self._output.regions(item):
            return
        each = self._output.read(item, LOGPROBS).astype(np.float64)
        total = each.sum()
        counted = max(1, len(each) - self._dataset.documents(self._input(item)))
        for name, right, size in (
            ("logprobs_sum", total, np.abs(each).sum()),
            ("perplexity", np.exp(-total / counted), np.exp(-total / counted)),
        ):
            found = float(self._output.read(item, name).reshape(-1)[0])
            if not abs(found - right) <= SUMS * size:
                yield f"{name} is {found:.8g}; the logprobs give {right:.8g}"

    def _input(self, item: ModelItem) -> ModelItem:
        found = self._inputs.get(item.name)
        if found is None or found.problem.tokens != item.problem.tokens:
            raise RejectedError(
                f"{self._output.path} was made for {item.problem.tokens} tokens; this file has "
                + (f"{found.problem.tokens}" if found else "no such item"),
                fix="name the file that it was made from",
                file=self._dataset.path,
                item=item.name,
            )
        return found

    def _compare(self, report: ModelReport) -> None:
        """Note the errors of all tensors of an item, over the documents that can be run."""
        item = report.item
        tensors = {
            name: self._output.read(item, name)
            for name in (EMBEDDING,)
            if name in self._output.regions(item)
        }
        compared = np.zeros(item.problem.tokens, bool)
        for document in self._documents(report):
            span = Span(document.start, document.stop)
            ids = self._dataset.ids(self._input(item), (span,))
            exact, rounded = self._exact.run(ids), self._rounded.run(ids)
            found = {
                name: self._output.read(item, name, (span,)).astype(np.float64)
                for name in (HIDDEN, LOGPROBS)
                if name in self._output.regions(item)
            }
            if document.whole and tensors:
                width = exact[HIDDEN].shape[1]
                rows = tensors[EMBEDDING].reshape(-1, width).astype(np.float64)
                found[EMBEDDING] = rows[document.number][None]
                for given in (exact, rounded):
                    given[EMBEDDING] = _pooled(given[HIDDEN], self._pool)
            for name, values in found.items():
                errors = report.errors.setdefault(name, Errors())
                errors.found += _relative(values, exact[name])
                errors.rounding += _relative(rounded[name], exact[name])
            compared[span.slice] = True
        report.rows = int(compared.sum())
        shards = report.entry.shards
        seen = [any(compared[span.slice].any() for span in spans) for spans in shards]
        report.ranks = sum(seen)
        if report.ranks == 1 < len(shards):
            report.notes.append(
                f"only tokens of rank {seen.index(True)} were compared: --tokens "
                f"{item.problem.tokens} would compare those of all {len(shards)}"
            )

    def _documents(self, report: ModelReport) -> Iterator[Document]:
        """Choose documents, or prefixes of them, up to so many tokens; note what is left out."""
        item, limit = self._input(report.item), self._extent.tokens
        starts = self._dataset.starts(item)
        stops = np.append(starts[1:], item.problem.tokens)
        draw = np.random.default_rng((self._extent.seed, zlib.crc32(item.name.encode())))
        left, long = limit, 0
        for number in map(int, draw.permutation(len(starts))):
            start, stop = int(starts[number]), int(stops[number])
            whole = stop - start <= limit
            if left <= 0:
                continue
            if not whole and not self._is_causal(item, Span(start, min(stop, start + PROBE))):
                long += 1
                continue
            yield Document(number, start, stop if whole else start + limit, whole)
            left -= stop - start
            if not whole:
                report.notes.append(
                    f"compared up to token {limit} of {stop - start} only: --tokens {stop - start} "
                    "would compare all"
                )
        if long:
            report.notes.append(
                f"{long} of {len(starts)} documents of more than {limit} tokens not compared; "
                "--tokens sets that length"
            )

    def _is_causal(self, item: ModelItem, span: Span) -> bool:
        """Find out whether later tokens change what earlier ones give."""
        if self._causal is None:
            ids = self._dataset.ids(item, (span,))
            half = len(ids) // 2
            whole, prefix = (self._exact.run(some)[HIDDEN][:half] for some in (ids, ids[:half]))
            self._causal = max(_relative(prefix, whole)) < 1e-3
        return self._causal


def _pooled(hidden: Array, pool: str) -> Array:
    """``[1, D]`` of ``[S, D]``."""
    rows: dict[str, Array] = {"mean": hidden.mean(0), "last": hidden[-1], "first": hidden[0]}
    return rows[pool][None]


def _relative(found: Array, right: Array) -> list[float]:
    """Row by row, relative to the root mean square of all rows' norms."""
    found, right = (each.reshape(len(right), -1) for each in (found, right))
    size = np.sqrt((right**2).sum(1).mean()) or 1.0
    errors: list[float] = (np.sqrt(((found - right) ** 2).sum(1)) / size).tolist()
    return errors


def _judge(reports: Sequence[ModelReport]) -> None:
    """Compare what was found with the rounding errors over all items."""
    names = dict.fromkeys(name for report in reports for name in report.errors)
    for name in names:
        rounding = np.concatenate([r.errors[name].rounding for r in reports if name in r.errors])
        overall, worst = OVERALL * _rms(rounding), WORST * float(rounding.max())
        for report in reports:
            if name not in report.errors:
                continue
            if not overall < TELLING:
                report.notes.append(
                    f"{name} not judged: rounding alone makes an error of {overall / OVERALL:.2g}"
                )
                continue
            found = np.array(report.errors[name].found)
            measures = (Measures(_rms(found), overall), Measures(float(found.max()), worst))
            report.measures[name] = max(measures, key=lambda measure: measure.used)


def _rms(errors: Array) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))
