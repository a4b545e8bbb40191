"""Names: what they may look like, and in which order they come."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdattn_mpi.dataset.layout import batch_item_name, item_name_fault, natural_order, shown


def test_numbers_come_in_their_order() -> None:
    names = ["item10", "item2", "item", "a", "item1.10", "item1.9", "10", "9", "item02", "item2"]
    ordered = ["9", "10", "a", "item", "item1.9", "item1.10", "item02", "item2", "item2", "item10"]
    assert sorted(names, key=natural_order) == ordered


@settings(max_examples=50)
@given(st.lists(st.text("ab01٣", max_size=6), max_size=8), st.randoms())
def test_the_order_of_names_is_total(names: list[str], random: object) -> None:
    ordered = sorted(names, key=natural_order)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert sorted(names, key=natural_order) == ordered


def test_very_long_numbers_are_compared_too() -> None:
    assert natural_order("9" * 5000) < natural_order("1" + "0" * 5000)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a/b", "/etc/passwd", "a\\b", "x" * 201, " a", "a,b"),
        *("a\0b", "a\x1b[31m", "a\nb", "\udcff", "a\u202eb"),
    ],
)
def test_names_that_could_do_harm_are_refused(name: str) -> None:
    assert item_name_fault(name)


@pytest.mark.parametrize(
    "name", ["a", "0", "layer.3/"[:7], "Süd", "列1", "...", "a b", "-x", "a[0]"]
)
def test_plain_names_are_taken(name: str) -> None:
    assert not item_name_fault(name)
    assert not item_name_fault(batch_item_name(name, 12))


@given(st.text(max_size=300))
def test_what_is_shown_cannot_drive_a_terminal(name: str) -> None:
    assert shown(name).isprintable()
    assert len(shown(name)) <= 201
