"""Writing shards into an output and reading them back; outputs that are not as they should be."""

from __future__ import annotations

import errno
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdattn_mpi.dataset import ModelItem, Output, create_output, open_dataset, open_output
from mdattn_mpi.errors import MdattnError, OutputError, RejectedError
from mdattn_mpi.partition import partition
from mdattn_mpi.problem import ModelProblem, Span, TensorSpec
from tests.support.dataset_files import random_tensors, same_bits, write_dataset
from tests.support.group import take


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.h5"
    tensors = {name: random_tensors((37 + n, 23, 4, 2, 16, 24)) for n, name in enumerate("ab")}
    write_dataset(path, tensors, None, {"b": {"causal": "upper_left"}})
    return path


def made(data: Path, *, room: bool = True, ranks: int = 3, **attributes: Any) -> Path:
    """Make an empty output for all items, with room for LSE."""
    path = data.with_name("out.h5")
    with open_dataset(data) as dataset:
        create_output(
            path,
            dataset.items,
            ranks=ranks,
            lse=room,
            attributes={**dataset.identity, **attributes},
            overwrite=True,
        )
    return path


def random_results(output: Output, name: str) -> tuple[Any, Any]:
    """Any bit patterns of the right shapes."""
    problem = output.item(name).problem
    draw = np.random.default_rng()
    shape = (problem.q_tokens, problem.q_heads, problem.v_head_dim)
    out = draw.integers(0, 1 << 16, shape, np.uint16).view(ml_dtypes.bfloat16)
    return out, draw.integers(0, 1 << 32, shape[:2], np.uint32).view(np.float32)


def results(out: Any, sums: Any, lse: bool = True) -> dict[str, Any]:
    """What a rank gives to `Output.write`."""
    return {"output": out, "lse": sums} if lse else {"output": out}


@settings(max_examples=25, deadline=None)
@given(ranks=st.integers(1, 50), strategy=st.sampled_from(["ring", "ulysses"]), lse=st.booleans())
def test_shards_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, ranks: int, strategy: Any, lse: bool
) -> None:
    data = tmp_path_factory.mktemp("shards") / "data.h5"
    tensors = {name: random_tensors((37, 23, 4, 2, 16, 24)) for name in "ab"}
    write_dataset(data, tensors, None, {"b": {"causal": "upper_left"}})
    path = made(data, room=lse, ranks=ranks)
    with open_output(path, writable=True) as output:
        for item in output.items:
            out, sums = random_results(output, item.name)
            shards = partition(item.problem, strategy, ranks).query
            crc32s = []
            for spans in shards:
                part, part_sums = take(out, spans), take(sums, spans)
                crc32s.append(output.write(item, spans, results(part, part_sums, lse)))
                wanted = zlib.crc32(part.tobytes() + (part_sums.tobytes() if lse else b""))
                assert crc32s[-1] == wanted == output.checksum(item, spans)
            output.sync()
            output.ledger.commit(item, crc32s, strategy, shards)
            assert same_bits(output.read(item, "output"), out)
            backwards = [Span(20, 37), Span(5, 6)]
            assert same_bits(output.read(item, "output", backwards), take(out, backwards))
            if lse:
                assert same_bits(output.read(item, "lse"), sums)
    with open_output(path) as output:
        for item, entry in zip(output.items, output.ledger.entries(), strict=True):
            assert entry.state == "done"
            for spans, crc32 in zip(entry.shards, entry.crc32s, strict=True):
                assert output.checksum(item, spans) == crc32
    with h5py.File(path) as file:  # and any h5py reads it
        for item in output.items:
            whole = file[f"items/{item.name}/output"]
            raw = np.empty(whole.shape, np.uint16)
            whole.id.read(h5py.h5s.ALL, h5py.h5s.ALL, raw, whole.id.get_type())
            with open_output(path) as again:
                assert raw.tobytes() == again.read(item, "output").tobytes()


def test_large_shards_and_several_writers(tmp_path: Path) -> None:
    """More than one block of a checksum, four ranks at once."""
    data = tmp_path / "data.h5"
    write_dataset(data, {"a": random_tensors((9000, 1, 8, 1, 256, 256))})
    path = made(data)
    with open_output(path) as output:
        out, sums = random_results(output, "a")
    shards = partition(output.items[0].problem, "ring", 4).query

    def rank(spans: Any) -> int:
        with open_output(path, writable=True) as own:
            return own.write(own.item("a"), spans, results(take(out, spans), take(sums, spans)))

    with ThreadPoolExecutor(4) as ranks:
        crc32s = list(ranks.map(rank, shards))
    with open_output(path) as output:
        assert same_bits(output.read(output.item("a"), "output"), out)
        assert same_bits(output.read(output.item("a"), "lse"), sums)
        assert [output.checksum(output.item("a"), spans) for spans in shards] == crc32s


def test_strided_results_are_written_in_order(data: Path) -> None:
    with open_output(made(data), writable=True) as output:
        item = output.item("a")
        out, sums = random_results(output, "a")
        swapped = np.ascontiguousarray(out.swapaxes(0, 1)).swapaxes(0, 1)
        output.write(item, [Span(0, 37)], results(swapped, sums))
        assert same_bits(output.read(item, "output"), out)


def test_wrong_arrays_are_noticed(data: Path) -> None:
    with open_output(made(data), writable=True) as output:
        item = output.item("a")
        out, sums = random_results(output, "a")
        spans = [Span(0, 37)]
        for bad_out, bad_sums in (
            (out[:-1], sums),
            (out.view(np.uint16), sums),
            (out[:, :, :-1], sums),
            (out, sums[:-1]),
            (out, sums.view(np.int32)),
        ):
            with pytest.raises(ValueError, match=r"lse|want"):
                output.write(item, spans, {"output": bad_out, "lse": bad_sums})
        with pytest.raises(ValueError, match=r"want \['output', 'lse'\], got \['output'\]"):
            output.write(item, spans, {"output": out})
        with pytest.raises(ValueError, match=r"got .*'other'"):
            output.write(item, spans, {**results(out, sums), "other": sums})
        with pytest.raises(ValueError, match="not within"):
            output.write(item, [Span(1, 38)], results(out, sums))
        assert not output.read(item, "output").view(np.uint16).any()


def test_an_item_that_is_not_in_it(data: Path) -> None:
    with (
        open_output(made(data)) as output,
        pytest.raises(RejectedError, match="not in this output"),
    ):
        output.item("c")


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_disk_that_fails(data: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = made(data)

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_output(path, writable=True) as output:
        item = output.item("a")
        out, sums = random_results(output, "a")
        monkeypatch.setattr(os, call, fail)
        attempts: list[Any] = [
            lambda: output.ledger.commit(item, [1], "ring", [[Span(0, 37)]]),
            lambda: output.ledger.fail(item, "no"),
        ]
        if call == "pwrite":
            attempts.append(lambda: output.write(item, [Span(0, 37)], results(out, sums)))
        else:
            attempts.append(output.sync)
        for attempt in attempts:
            with pytest.raises(OutputError, match="No space left") as caught:
                attempt()
            assert caught.value.file == str(path)
            assert caught.value.fix
        monkeypatch.undo()
        assert output.ledger.state(item) == "todo"


OUTPUTS = (
    TensorSpec("states", (1, 21, 3), "bfloat16", 1),
    TensorSpec("embedding", (3, 2), "float32", None),
    TensorSpec("ids", (21,), "int64"),
)


class TestModel:
    """Outputs of a model's engine: any dtype, and tensors that only the first rank writes."""

    shards = ((Span(0, 8),), (Span(8, 16),), (Span(16, 21),))

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        items = [ModelItem(name, n, ModelProblem(21, OUTPUTS)) for n, name in enumerate("ab")]
        create_output(tmp_path / "out.h5", items, ranks=3)
        return tmp_path / "out.h5"

    def fill(self, path: Path) -> dict[str, Any]:
        """Write and commit item b as three ranks; what was written."""
        draw = np.random.default_rng()
        whole = {
            "states": draw.standard_normal((1, 21, 3)).astype(ml_dtypes.bfloat16),
            "embedding": draw.standard_normal((3, 2)).astype(np.float32),
            "ids": draw.integers(-(1 << 60), 1 << 60, 21),
        }
        with open_output(path, writable=True) as output:
            item, crc32s = output.item("b"), []
            for rank, (span,) in enumerate(self.shards):
                part = {"states": whole["states"][:, span.slice], "ids": whole["ids"][span.slice]}
                if rank == 0:
                    part["embedding"] = whole["embedding"]
                crc32s.append(output.write(item, (span,), part))
            output.sync()
            output.ledger.commit(item, crc32s, "allgather", self.shards)
        return whole

    def test_shards_make_the_whole(self, path: Path) -> None:
        whole = self.fill(path)
        with open_output(path) as output:
            assert [item.problem for item in output.items] == [ModelProblem(21, OUTPUTS)] * 2
            assert [entry.state for entry in output.ledger.entries()] == ["todo", "done"]
            item = output.item("b")
            for name, array in whole.items():
                assert same_bits(output.read(item, name), array)
            some = output.read(item, "states", [Span(20, 21), Span(3, 5)])
            assert same_bits(some, whole["states"][:, [20, 3, 4]])
            assert output.damaged(item) == ()
            assert not output.lse
        with h5py.File(path) as file:
            assert np.array_equal(file["items/b/ids"][:], whole["ids"])
            assert np.array_equal(file["items/b/embedding"][:], whole["embedding"])

    @pytest.mark.parametrize(
        ("tensor", "at", "rank"), [("states", 20, 2), ("ids", 9, 1), ("embedding", 0, 0)]
    )
    def test_a_changed_byte_is_found_in_its_rank(
        self, path: Path, tensor: str, at: int, rank: int
    ) -> None:
        self.fill(path)
        with open_output(path, writable=True) as output:
            item = output.item("b")
            ((offset, _), *_) = output.regions(item)[tensor].runs([Span(at, at + 1)])
            byte = os.pread(output._fd, 1, offset)
            os.pwrite(output._fd, bytes([byte[0] ^ 1]), offset)
            assert output.damaged(item) == (rank,)

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            '{"tokens": 21}',
            '{"tokens": 21, "outputs": {"ids": {"shape": [21], "dtype": "int64"}}}',
            '{"tokens": 21, "outputs": {"ids": {"shape": [20], "dtype": "i8", "token_dim": 0}}}',
            '{"tokens": 21, "outputs": {"x": {"shape": [2, 21], "dtype": "i8", "token_dim": 1}}}',
            '{"tokens": 21, "outputs": {"x": {"shape": [-1], "dtype": "i8", "token_dim": null}}}',
            '{"tokens": 21, "outputs": {"x": {"shape": [21], "dtype": "no", "token_dim": 0}}}',
            '{"tokens": 21, "outputs": {"ids": {"shape": [21], "dtype": "<i8", "token_dim": 7}}}',
            '{"tokens": "n", "outputs": {}}',
        ],
    )
    def test_descriptions_that_make_no_sense(self, path: Path, text: str) -> None:
        with h5py.File(path, "a") as file:
            file["items/a"].attrs["tensors"] = text
        with pytest.raises(RejectedError, match="its tensors is"):
            open_output(path)

    def test_another_dtype_than_described(self, path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file["items/a/ids"]
            file["items/a/ids"] = np.zeros(21, ">i8")
        with pytest.raises(RejectedError, match=r"want int64 \[21\], contiguous"):
            open_output(path)


class TestResume:
    """The same job goes on; another one is refused, with what changed."""

    options: ClassVar = {
        "strategy": "ring",
        "backend": "cpu",
        "kernel": "auto",
        "transfer": "auto",
        "engine": "",
        "lse": "true",
        "ignore": "",
    }

    def check(self, data: Path, ranks: int = 3, allow: bool = False, **options: str) -> None:
        with open_dataset(data) as dataset, open_output(data.with_name("out.h5")) as output:
            given = {**dataset.identity, **self.options, **options, "ranks": ranks}
            output.check_resume(dataset.items, given, allow_change=allow)

    def test_the_same(self, data: Path) -> None:
        made(data, **self.options)
        self.check(data)
        data.rename(data.with_name("moved.h5"))
        os.link(data.with_name("moved.h5"), data)
        self.check(data)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"strategy": "ulysses"}, "strategy was 'ring', is 'ulysses'"),
            ({"backend": "cuda"}, "backend was 'cpu', is 'cuda'"),
            ({"kernel": "flash"}, "kernel was 'auto', is 'flash'"),
            ({"transfer": "nccl"}, "transfer was 'auto', is 'nccl'"),
            ({"engine": "e3b0c442"}, "engine was '', is 'e3b0c442'"),
            ({"ranks": 2}, "ranks was 3, is 2"),
        ],
    )
    def test_what_may_change(self, data: Path, change: Any, said: str) -> None:
        made(data, **self.options)
        with pytest.raises(RejectedError, match=said) as caught:
            self.check(data, **change)
        assert "--allow-change" in caught.value.fix
        self.check(data, allow=True, **change)

    def test_what_may_not(self, data: Path) -> None:
        made(data, **self.options)
        for allow in (False, True):
            with pytest.raises(RejectedError, match="lse was 'true', is 'false'") as caught:
                self.check(data, allow=allow, lse="false")
            assert "--allow-change" not in caught.value.fix

    def test_earlier_versions_recorded_less(self, data: Path) -> None:
        made(data, strategy="ring", backend="cpu", lse="true")
        self.check(data)
        with pytest.raises(RejectedError, match="kernel was not recorded, is 'flash'") as caught:
            self.check(data, kernel="flash")
        assert "--allow-change" in caught.value.fix
        for allow in (False, True):
            with pytest.raises(RejectedError, match="ignore was not recorded, is 'window'"):
                self.check(data, allow=allow, ignore="window")

    def test_another_input(self, data: Path) -> None:
        made(data, **self.options)
        tensors = {name: random_tensors((37 + n, 23, 4, 2, 16, 24)) for n, name in enumerate("ab")}
        write_dataset(data, tensors, None, {"b": {"causal": "upper_left"}})
        with pytest.raises(RejectedError, match="input_digest was"):
            self.check(data, allow=True)

    def test_other_items(self, data: Path) -> None:
        made(data, **self.options)
        write_dataset(data, {"a": random_tensors()})
        with pytest.raises(RejectedError, match="its items, or what is to be computed"):
            self.check(data, allow=True)


class TestDamaged:
    """Outputs that were changed by hand, or on purpose."""

    def refused(self, path: Path, said: str, writable: bool = False) -> None:
        with pytest.raises(RejectedError, match=said) as caught:
            open_output(path, writable)
        assert caught.value.file == str(path)
        assert caught.value.fix

    @pytest.mark.parametrize(
        ("gone", "said"),
        [
            ("items", "has no group /items"),
            ("ledger", "no group /ledger"),
            ("ledger/state", "no dataset 'state'"),
            ("ledger/spans", "no dataset 'spans'"),
            ("items/a/output", "no dataset 'output'"),
            ("items/a/lse", "some of its items have an lse"),
            ("items/a", "aren't numbered"),
        ],
    )
    def test_parts_that_are_missing(self, data: Path, gone: str, said: str) -> None:
        path = made(data)
        with h5py.File(path, "a") as file:
            del file[gone]
        self.refused(path, said)

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("index", -5, "aren't numbered"),
            ("index", "many", "index is 'many'"),
            ("problem", "{", "its problem is {"),
            ("problem", "[1]", "its problem is"),
            ("problem", 3, "its problem is 3"),
            ("problem", '{"q_tokens": 1}', "its problem is"),
        ],
    )
    def test_attributes_that_are_missing_or_wrong(
        self, data: Path, name: str, value: Any, said: str
    ) -> None:
        path = made(data)
        with h5py.File(path, "a") as file:
            file["items/a"].attrs[name] = value
        self.refused(path, said)
        with h5py.File(path, "a") as file:
            del file["items/a"].attrs[name]
        self.refused(path, "is None")

    @pytest.mark.parametrize(
        ("field", "value"), [("q_tokens", -5), ("q_tokens", "many"), ("scale", -1.0), ("causal", 1)]
    )
    def test_problems_that_are_none(self, data: Path, field: str, value: Any) -> None:
        path = made(data)
        with h5py.File(path, "a") as file:
            problem = json.loads(file["items/a"].attrs["problem"])
            file["items/a"].attrs["problem"] = json.dumps({**problem, field: value})
        self.refused(path, "its problem is")

    def test_another_shape_dtype_or_storage(self, data: Path) -> None:
        path = made(data)
        for array, options in (
            (np.zeros((37, 4, 23), ml_dtypes.bfloat16), {}),
            (np.zeros((37, 4, 24), np.float16), {}),
            (np.zeros((37, 4, 24), np.float32), {}),
            (np.zeros((37, 4, 24), ml_dtypes.bfloat16), {"chunks": True}),
        ):
            with h5py.File(path, "a") as file:
                del file["items/a/output"]
                file.create_dataset("items/a/output", data=array, **options)
            self.refused(path, r"want bfloat16 \[37, 4, 24\], contiguous")

    def test_datasets_that_share_bytes(self, data: Path) -> None:
        """Writing one would change the other, or the ledger."""
        path = made(data)
        with h5py.File(path, "a") as file:
            del file["items/b/lse"]
            file["items/b"]["lse"] = file["items/a/lse"]
        self.refused(path, "want float32")
        path = made(data)
        with h5py.File(path, "a") as file:
            del file["ledger/strategy"]
            file["ledger"]["strategy"] = file["ledger/state"]
        self.refused(path, "two of its datasets overlap")

    def test_links_to_other_files(self, data: Path) -> None:
        path = made(data)
        other = data.with_name("other.h5")
        other.write_bytes(path.read_bytes())
        before = other.read_bytes()
        with h5py.File(path, "a") as file:
            del file["items/a/output"]
            file["items/a/output"] = h5py.ExternalLink("other.h5", "/items/a/output")
        self.refused(path, "leads to another file")
        assert other.read_bytes() == before

    def test_a_dataset_is_no_output(self, data: Path) -> None:
        self.refused(data, "format is 'mdattn-dataset'")

    def test_cut_anywhere(self, data: Path) -> None:
        path = made(data)
        whole = path.read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 200)):
            path.write_bytes(whole[:length])
            with pytest.raises(MdattnError):
                open_output(path)

    def test_replaced_while_it_is_opened(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = made(data)
        monkeypatch.setattr(os.path, "sameopenfile", lambda *_: False)
        self.refused(path, "was replaced", writable=True)


def test_reading_needs_no_permission_to_write(data: Path) -> None:
    path = made(data)
    path.chmod(0o400)
    with open_output(path) as output:
        assert output.ledger.state(output.items[0]) == "todo"
