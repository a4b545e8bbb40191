"""Files of token ids: written, read anywhere, refused where they aren't as the format says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import mdattn_mpi
from mdattn_mpi.dataset import open_dataset, open_tokens
from mdattn_mpi.dataset.tokens import holds_tokens
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import ModelProblem, Span, TensorSpec

RANDOM = np.random.default_rng(5)


def ids(tokens: int, dtype: str = "int64") -> Any:
    return RANDOM.integers(0, 60_000, tokens).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_what_was_written_is_read_from_anywhere(tmp_path: Path, dtype: str) -> None:
    given, starts = ids(1001, dtype), np.array([0, 1, 700])
    path = tmp_path / "tokens.h5"
    with mdattn_mpi.DatasetWriter(path) as writer:
        writer.add_tokens("b", given, starts, names=["x", "yy", "zürich"])
        writer.add_tokens("a", given[::-2])
    zigzag = (Span(100, 350), Span(800, 1001))
    with open_tokens(path) as file:
        assert [item.name for item in file.items] == ["a", "b"]
        a, b = file.items
        assert np.array_equal(file.ids(a), given[::-2])
        assert np.array_equal(file.ids(b, zigzag), np.concatenate([given[100:350], given[800:]]))
        assert file.ids(b, ()).shape == (0,)
        assert file.starts(a).tolist() == [0]
        assert file.starts(b).tolist() == [0, 1, 700]
        assert (file.documents(a), file.documents(b)) == (1, 3)
        assert file.describe(b) == "1001 tokens of 3 documents"
        for item, tensor in (a, "input_ids"), (b, "input_ids"), (b, "segments"):
            assert file.checksum(item, tensor) == file.tensor(item, tensor).crc32 is not None
    with h5py.File(path) as file:
        assert [name.decode() for name in file["items/b/names"]] == ["x", "yy", "zürich"]


@pytest.mark.parametrize("options", [{}, {"chunks": (64,), "compression": "gzip"}])
def test_files_of_other_programs_need_no_attribute(tmp_path: Path, options: Any) -> None:
    given, path = ids(300, "int32"), tmp_path / "theirs.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("items/x/input_ids", data=given, **options)
    with open_tokens(path) as tokens:
        (item,) = tokens.items
        found = tokens.ids(item, (Span(5, 70), Span(99, 300)))
        assert np.array_equal(found, np.concatenate([given[5:70], given[99:]]))
    assert holds_tokens(path)


def test_what_is_made_of_an_item_depends_on_tokens_and_documents(tmp_path: Path) -> None:
    def problem(tokens: int, documents: int) -> ModelProblem:
        return ModelProblem(tokens, (TensorSpec("embedding", (documents, 8), "float32", None),))

    path = tmp_path / "tokens.h5"
    with mdattn_mpi.DatasetWriter(path) as writer:
        writer.add_tokens("a", ids(10), [0, 4])
    with open_tokens(path, problem) as file, open_tokens(path) as other:
        assert file.describe(file.items[0]) == (
            "10 tokens of 2 documents, giving embedding float32 [2, 8]"
        )
        assert file.digest == other.digest


def test_a_changed_id_changes_the_digest(tmp_path: Path) -> None:
    digests = set()
    for change in (0, 1):
        path = tmp_path / f"{change}.h5"
        with h5py.File(path, "w") as file:
            file["items/x/input_ids"] = np.arange(50) + change
        with open_tokens(path) as tokens:
            digests.add(tokens.digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("tensors", "attributes", "message"),
    [
        ({"input_ids": np.zeros(0, np.int64)}, {}, r"input_ids has shape \[0\]"),
        ({"input_ids": np.zeros((2, 9), np.int64)}, {}, r"has shape \[2, 9\]. Fix: store one seq"),
        ({"input_ids": np.zeros(9, np.float32)}, {}, r"holds float32. Fix: store uint16, uint32"),
        ({"input_ids": np.zeros(9, np.int8)}, {}, r"holds int8"),
        ({"input_ids": np.zeros(9, ">i4")}, {}, r"big-endian"),
        ({"query": np.zeros((9, 1, 8), np.float16)}, {}, r"no dataset 'input_ids'.*leave --model"),
        ({"input_ids": ids(3), "segments": np.zeros(4, np.int64)}, {}, r"4 segments of 3 tokens"),
        ({"input_ids": ids(3), "segments": np.zeros(1, np.int32)}, {}, r"segments holds int32"),
        ({"input_ids": ids(3), "attention_mask": ids(3)}, {}, r"dataset attention_mask.*--ignore"),
        ({"input_ids": ids(3)}, {"causal": "upper_left"}, r"attribute causal, which only counts"),
    ],
)
def test_refused_by_name(tmp_path: Path, tensors: Any, attributes: Any, message: str) -> None:
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        file["items/good/input_ids"] = ids(5)
        item = file.create_group("items/bad")
        item.attrs.update(attributes)
        for name, array in tensors.items():
            item[name] = array
    with pytest.raises(RejectedError, match=message) as refused:
        open_tokens(path)
    assert (refused.value.file, refused.value.item) == (str(path), "bad")
    with open_tokens(path, keep_faults=True) as file:
        assert [item.name for item in file.items] == ["good"]
        assert len(file.faults) == 1


@pytest.mark.parametrize("starts", [[1, 2], [0, 2, 2], [0, 9], [0, 3, 1], [-1]])
def test_segments_that_are_none_fail_the_item(tmp_path: Path, starts: list[int]) -> None:
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        file["items/bad/input_ids"] = ids(9)
        file["items/bad/segments"] = np.array(starts)
    with open_tokens(path) as tokens, pytest.raises(ItemError, match=r"segments\[\d\] is -?\d"):
        tokens.starts(tokens.items[0])
    writer = mdattn_mpi.DatasetWriter(tmp_path / "new.h5")
    with writer, pytest.raises(RejectedError, match="segments are"):
        writer.add_tokens("a", ids(9), starts)


def test_attention_on_token_ids_is_refused_with_the_option_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "tokens.h5"
    with mdattn_mpi.DatasetWriter(path) as writer:
        writer.add_tokens("a", ids(10))
    with pytest.raises(RejectedError, match=r"item 'a'.*holds token ids.*name a model: --model"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("x", ids(5), "in the dataset already"),
        ("a/b", ids(5), "looks like a path"),
        ("y", np.zeros(0, np.int64), r"input_ids is int64 \[0\]"),
        ("y", np.zeros(3), r"input_ids is float64 \[3\]"),
        ("y", np.zeros((1, 3), np.int64), r"input_ids is int64 \[1, 3\]"),
    ],
)
def test_writer_refuses(tmp_path: Path, name: str, given: Any, message: str) -> None:
    with mdattn_mpi.DatasetWriter(tmp_path / "new.h5") as writer:
        writer.add_tokens("x", ids(4))
        with pytest.raises(RejectedError, match=message):
            writer.add_tokens(name, given)
