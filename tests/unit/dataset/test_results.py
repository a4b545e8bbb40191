"""An output as other programs read it: a mapping of arrays that stay in the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mdattn_mpi
from mdattn_mpi.dataset import ModelItem, create_output, positioned
from mdattn_mpi.dataset import open_output as open_file
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import AttentionProblem, ModelProblem, Span, TensorSpec
from tests.support.finished import Files, finished

PROBLEMS = {
    "b": AttentionProblem(37, 41, 4, 2, 8, 24, "bfloat16", "lower_right"),
    "a": AttentionProblem(23, 23, 2, 2, 8, 8, "float16"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return finished(tmp_path_factory.mktemp("results"), PROBLEMS, lse=True)


@pytest.fixture
def results(files: Files) -> Iterator[Any]:
    with mdattn_mpi.open_output(files.output) as opened:
        yield opened


def whole(files: Files, name: str, tensor: Any = "output") -> Any:
    with open_file(files.output) as output:
        return output.read(output.item(name), tensor)


def test_it_is_a_mapping(results: Any, files: Files) -> None:
    with open_file(files.output) as output:
        assert list(results) == [item.name for item in output.items]
    assert len(results) == 2
    assert {name: list(item) for name, item in results.items()} == {
        "a": ["output", "lse"],
        "b": ["output", "lse"],
    }
    assert results["b"].problem == PROBLEMS["b"]
    assert results["b"].state == "done"
    assert results.attributes["backend"] == "cpu"
    assert "c" not in results
    with pytest.raises(KeyError, match=r"out.h5 has no item 'c'; it has 2 others"):
        results["c"]


@pytest.mark.parametrize("name", PROBLEMS)
def test_arrays_are_what_the_file_holds(results: Any, files: Files, name: str) -> None:
    tensor, right = results[name]["output"], whole(files, name)
    assert np.abs(right.astype(np.float32)).max() > 0.1
    assert (tensor.shape, tensor.dtype, tensor.ndim) == (right.shape, right.dtype, 3)
    assert tensor.dtype == {"b": ml_dtypes.bfloat16, "a": np.float16}[name]
    assert np.asarray(tensor).tobytes() == right.tobytes()
    assert np.asarray(tensor, np.float32).tobytes() == right.astype(np.float32).tobytes()
    assert tensor.astype("float32").tobytes() == right.astype(np.float32).tobytes()
    assert not np.any(right - tensor)
    lse = results[name]["lse"]
    assert lse.dtype == np.float32
    assert np.asarray(lse).tobytes() == whole(files, name, "lse").tobytes()


INDICES = st.one_of(
    st.integers(-37, 36),
    st.slices(37),
    st.just(Ellipsis),
    st.none(),
    st.lists(st.integers(-37, 36), min_size=1, max_size=5),
    st.tuples(st.slices(37), st.integers(-4, 3), st.slices(24)),
    st.tuples(st.integers(-37, 36), st.slices(4)),
    st.tuples(st.just(Ellipsis), st.integers(0, 23)),
)


@given(key=INDICES)
def test_an_index_gives_what_it_gives_of_the_array(files: Files, key: Any) -> None:
    right = whole(files, "b")[key]
    with mdattn_mpi.open_output(files.output) as results:
        found = results["b"]["output"][key]
    assert np.shape(found) == np.shape(right)
    assert np.asarray(found).tobytes() == np.asarray(right).tobytes()


def test_of_a_range_of_tokens_only_these_are_read(
    results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    exactly = positioned.read_exactly

    def counted(fd: int, offset: int, array: Any) -> None:
        read.append(array.nbytes)
        exactly(fd, offset, array)

    monkeypatch.setattr(positioned, "read_exactly", counted)
    tensor = results["b"]["output"]
    token = 4 * 24 * 2
    for key, tokens in (
        (slice(10, 20), 10), (7, 1), (-1, 1), (slice(20, 9, -5), 11), (slice(5, 5), 0),
        ((slice(3, 5), 1), 2), (Ellipsis, 37),
    ):  # fmt: skip
        read.clear()
        tensor[key]
        assert sum(read) == tokens * token, key


@given(
    key=st.one_of(
        st.slices(21),
        st.tuples(st.slices(1), st.slices(21)),
        st.tuples(st.integers(-1, 0), st.integers(-21, 20)),
        st.tuples(st.just(Ellipsis), st.integers(0, 2)),
    )
)
def test_tensors_of_a_model_whose_tokens_are_another_dim(
    tmp_path_factory: pytest.TempPathFactory, key: Any
) -> None:
    path = tmp_path_factory.mktemp("model") / "out.h5"
    hidden = np.random.default_rng(0).standard_normal((1, 21, 3)).astype(np.float32)
    pooled = np.arange(5, dtype=np.int32)
    outputs = (TensorSpec("hidden", (1, 21, 3), "float32", 1), TensorSpec("p", (5,), "int32", None))
    item, spans = ModelItem("a", 0, ModelProblem(21, outputs)), (Span(0, 21),)
    create_output(path, [item], ranks=1)
    with open_file(path, writable=True) as output:
        crc32 = output.write(item, spans, {"hidden": hidden, "p": pooled})
        output.ledger.commit(item, [crc32], "ring", [spans])
    with mdattn_mpi.open_output(path) as results:
        assert list(results["a"]) == ["hidden", "p"]
        assert results["a"]["hidden"][key].tobytes() == hidden[key].tobytes()
        assert np.array_equal(results["a"]["p"], pooled)
        assert np.array_equal(results["a"]["p"][1:3], pooled[1:3])


@pytest.mark.parametrize("key", [37, -38, (0, 4), (0, 0, 0, 0)])
def test_what_is_not_there_is_an_index_error(results: Any, key: Any) -> None:
    with pytest.raises(IndexError):
        results["b"]["output"][key]


def test_an_item_that_is_not_done_is_not_read(tmp_path: Path) -> None:
    """What the file holds there would look like numbers."""
    files = finished(tmp_path, PROBLEMS)
    with open_file(files.output, writable=True) as output:
        output.ledger.fail(output.item("a"), "query holds a NaN")
    with mdattn_mpi.open_output(files.output) as results:
        assert [item.state for item in results.values()].count("failed") == 1
        for read in (np.asarray, lambda tensor: tensor[:3], lambda tensor: tensor.astype("f4")):
            with pytest.raises(ItemError, match=r"item 'a': failed: query holds a NaN. Fix: "):
                read(results["a"]["output"])
        assert np.asarray(results["b"]["output"]).any()
        assert list(results["b"]) == ["output"]


def test_a_file_that_was_cut_is_named(tmp_path: Path) -> None:
    files = finished(tmp_path, {"b": PROBLEMS["b"]})
    with mdattn_mpi.open_output(files.output) as results:
        tensor = results["b"]["output"]
        region = results._output.regions(results._output.items[0])["output"]
        os.truncate(files.output, region.stop - 1)
        with pytest.raises(RejectedError, match=r"out.h5: .* can't be read: .* was cut while open"):
            np.asarray(tensor)


def test_after_closing_it_says_so(files: Files) -> None:
    with mdattn_mpi.open_output(files.output) as results:
        tensor = results["b"]["output"]
        kept = tensor[:4]
    assert kept.shape == (4, 4, 24)
    for read in (lambda: tensor[:4], lambda: np.asarray(tensor), lambda: results["b"].state):
        with pytest.raises(RejectedError, match=r"out.h5: was closed before this was read"):
            read()


def test_what_is_no_output_is_refused(files: Files) -> None:
    with pytest.raises(RejectedError, match=r"data\.h5"):
        mdattn_mpi.open_output(files.data)
