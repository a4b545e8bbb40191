"""Embeddings and log-probabilities of several ranks, against those of the whole in float64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.models import outputs
from mdattn_mpi.models.outputs import embeddings, given_tensors, logprobs
from mdattn_mpi.models.sequence import TokenSequence, owners_of
from tests.support.fake_group import FakeGroup

torch = pytest.importorskip("torch", reason="needs the extra transformers")

WIDTH, VOCABULARY = 5, 11
STARTS = {"one document": [0], "packed": [0, 1, 9, 10], "long at the end": [0, 3]}


def every_rank(ranks: int, body: Callable[[Any], Any]) -> list[Any]:
    shared: dict[Any, Any] = {}
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        found[rank] = body(FakeGroup(rank, ranks, shared))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(ranks)]


class Case:
    def __init__(self, starts: list[int], ranks: int, tokens: int = 23) -> None:
        random = np.random.default_rng(ranks)
        self.ids = random.integers(0, VOCABULARY, tokens)
        self.starts = np.array(starts)
        self.hidden = torch.from_numpy(random.standard_normal((tokens, WIDTH))).bfloat16()
        self.head = torch.from_numpy(random.standard_normal((WIDTH, VOCABULARY))).bfloat16()
        self.owners = owners_of(tokens, ranks, True)
        self.ranks = ranks

    def sequence(self, rank: int) -> TokenSequence:
        return TokenSequence(self.ids, self.starts, self.owners[rank])

    @property
    def documents(self) -> list[Any]:
        return np.split(np.arange(len(self.ids)), self.starts[1:])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("pool", ["mean", "last", "first"])
def test_embeddings_are_those_of_each_document(pool: Any, starts: list[int], ranks: int) -> None:
    case = Case(starts, ranks)

    def body(group: Any) -> Any:
        sequence = case.sequence(group.rank)
        return embeddings(group, case.hidden[sequence.places], sequence, pool)

    hidden = case.hidden.double().numpy()
    choose: dict[str, Callable[[Any], Any]] = {
        "mean": lambda rows: hidden[rows].mean(0),
        "last": lambda rows: hidden[rows[-1]],
        "first": lambda rows: hidden[rows[0]],
    }
    right = np.array([choose[pool](rows) for rows in case.documents])
    for found in every_rank(ranks, body):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_logprobs_across_all_borders(
    starts: list[int], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "LOGIT_BYTES", 4 * VOCABULARY * 2)  # two tokens at a time
    case, most = Case(starts, ranks), []

    def logits_of(rows: Any) -> Any:
        most.append(len(rows))
        return rows @ case.head

    def body(group: Any) -> Any:
        sequence = case.sequence(group.rank)
        return sequence.places, *logprobs(
            group, case.hidden[sequence.places], sequence, logits_of, VOCABULARY
        )

    logits = (case.hidden @ case.head).double()
    every = logits.log_softmax(-1).numpy()
    right = np.zeros(len(case.ids))
    for rows in case.documents:
        right[rows[1:]] = every[rows[:-1], case.ids[rows[1:]]]
    assert np.count_nonzero(right) == len(case.ids) - len(starts)
    for places, found, (total, perplexity) in every_rank(ranks, body):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, right[places], rtol=1e-5, atol=1e-6)
        assert total == pytest.approx(right.sum(), rel=1e-5)
        counted = len(case.ids) - len(starts)
        assert perplexity == pytest.approx(np.exp(-right.sum() / counted), rel=1e-5)
    assert max(most) <= 2


def test_a_lone_token_has_no_predecessor() -> None:
    case = Case([0], 3, tokens=1)

    def body(group: Any) -> Any:
        sequence = case.sequence(group.rank)
        head = lambda rows: rows @ case.head  # noqa: E731
        return logprobs(group, case.hidden[sequence.places], sequence, head, VOCABULARY)

    for own, totals in every_rank(3, body):
        assert own.tolist() in ([0.0], [])
        assert totals.tolist() == [0.0, 1.0]


def test_outputs_are_named_in_their_order() -> None:
    found = given_tensors(("logprobs", "last_hidden_state", "embedding"), 9, 1, 4, "bfloat16")
    assert [(each.name, each.shape, each.dtype) for each in found] == [
        ("last_hidden_state", (9, 4), "bfloat16"),
        ("embedding", (4,), "float32"),
        ("logprobs", (9,), "float32"),
        ("logprobs_sum", (1,), "float64"),
        ("perplexity", (1,), "float64"),
    ]
    (packed,) = given_tensors(("embedding",), 9, 3, 4, "float16")
    assert (packed.shape, packed.token_dim) == ((3, 4), None)
