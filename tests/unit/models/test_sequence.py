"""Positions, targets and documents, against the whole sequence counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.models.sequence import Numbering, TokenSequence, owners_of


@st.composite
def sequences(draw: Any) -> tuple[Any, Any, int, bool]:
    tokens = draw(st.integers(1, 40))
    starts = draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=5))
    starts = {0, *(start for start in starts if start < tokens)}
    ids = draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens))
    return np.array(ids), np.array(sorted(starts)), draw(st.integers(1, 6)), draw(st.booleans())


def expected_positions(ids: Any, starts: Any, numbering: Numbering) -> list[int]:
    found, count = [], 0
    for place, token in enumerate(ids):
        count = 0 if place in starts else count
        if token == numbering.padding:
            found.append(numbering.padding)
        else:
            found.append(numbering.first + count)
            count += 1
    return found


@given(sequences(), st.sampled_from([Numbering(), Numbering(2, 1)]))
def test_all_ranks_together_number_as_one_process_does(case: Any, numbering: Numbering) -> None:
    ids, starts, ranks, causal = case
    right = np.array(expected_positions(ids, starts, numbering))
    seen: list[int] = []
    for own in owners_of(len(ids), ranks, causal):
        sequence = TokenSequence(ids, starts, own)
        seen += sequence.places.tolist()
        assert sequence.positions(numbering).tolist() == right[sequence.places].tolist()
    assert sorted(seen) == list(range(len(ids)))


@given(sequences())
def test_every_token_has_the_one_that_follows_in_its_document(case: Any) -> None:
    ids, starts, ranks, causal = case
    for own in owners_of(len(ids), ranks, causal):
        sequence = TokenSequence(ids, starts, own)
        targets, inside = sequence.targets()
        for place, target, there in zip(sequence.places, targets, inside, strict=True):
            assert there == (place + 1 < len(ids) and place + 1 not in starts)
            assert not there or target == ids[place + 1]


@given(sequences())
def test_runs_are_the_documents_of_the_rows(case: Any) -> None:
    ids, starts, ranks, causal = case
    for own in owners_of(len(ids), ranks, causal):
        sequence = TokenSequence(ids, starts, own)
        rows = [(row, n) for n, run in sequence.runs() for row in range(run.start, run.stop)]
        assert [row for row, _ in rows] == list(range(len(sequence.places)))
        for row, document in rows:
            assert starts[document] <= sequence.places[row]
            assert document + 1 == len(starts) or sequence.places[row] < starts[document + 1]


def test_roberta_counts_as_transformers_does() -> None:
    pytest.importorskip("transformers", reason="needs the extra transformers")
    import torch
    from transformers.models.roberta import modeling_roberta

    from mdattn_mpi.models.sequence import numbering_of
    from tests.support.model_ranks import network
    from tests.support.tiny_models import tiny_model

    ids = np.array([5, 1, 7, 8, 1, 1, 9])
    embeddings = modeling_roberta.RobertaEmbeddings
    right = embeddings.create_position_ids_from_input_ids(torch.from_numpy(ids)[None], 1)
    numbering = numbering_of(network(tiny_model("roberta")).backbone)
    sequence = TokenSequence(ids, np.array([0]), owners_of(7, 1, False)[0])
    assert sequence.positions(numbering).tolist() == right[0].tolist()
    assert numbering_of(network(tiny_model("bert")).backbone) == Numbering()
