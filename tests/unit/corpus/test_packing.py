"""Packing keeps the order of the texts, cuts none, and fills no sequence beyond its length."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.corpus.packing import alone, pack
from mdattn_mpi.corpus.texts import Text
from mdattn_mpi.corpus.tokenizer import Tokens


def of_lengths(lengths: list[int]) -> list[Tokens]:
    return [
        Tokens(Text(str(number), "", "", 0), np.full(length, number, np.uint16), 0)
        for number, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 40))
def test_packs(lengths: list[int], tokens: int) -> None:
    texts = of_lengths(lengths)
    packed = list(pack(texts, tokens))
    assert [text for item in packed for text in item.texts] == texts
    assert [item.name for item in packed] == [f"pack{n}" for n in range(len(packed))]
    for item, after in zip(packed, [*packed[1:], None], strict=True):
        size = sum(len(text.ids) for text in item.texts)
        assert size <= tokens or len(item.texts) == 1
        assert after is None or size + len(after.texts[0].ids) > tokens
        for start, text in zip(item.starts, item.texts, strict=True):
            ids = np.concatenate([each.ids for each in item.texts])
            assert np.array_equal(ids[start : start + len(text.ids)], text.ids)


def test_alone() -> None:
    items = list(alone(of_lengths([3, 1])))
    assert [(item.name, item.starts.tolist()) for item in items] == [("0", [0]), ("1", [0])]
