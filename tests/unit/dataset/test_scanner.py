"""The child process that looks at files: it may crash, and nothing else does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mdattn_mpi.dataset import (
    ModelItem,
    create_output,
    open_dataset,
    open_output,
    scan_file,
    scanner,
)
from mdattn_mpi.dataset.hdf5 import File
from mdattn_mpi.dataset.named import open_tensors, tensor_names
from mdattn_mpi.dataset.seen import FINGERPRINT_BLOCKS
from mdattn_mpi.errors import ItemError, RejectedError
from mdattn_mpi.problem import ModelProblem, Span, TensorSpec
from tests.support.dataset_files import How, random_tensors, same_bits, write_dataset

Program = Callable[[str], None]

CRASHES = {
    "SIGSEGV": "import ctypes; ctypes.string_at(0)",
    "SIGABRT": "os.abort()",
    "too long": "while True: pass",
    "exit code 3": "os._exit(3)",
}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Let children run some lines before they serve."""

    def use(lines: str) -> None:
        code = "import os, sys, time\nfrom mdattn_mpi.dataset import scan, source\n"
        code += "scan.CPU_SECONDS = 0.3\n" + textwrap.dedent(lines) + "\nscan.main()\n"
        monkeypatch.setattr(scanner, "PROGRAM", ("-c", code))
        monkeypatch.setattr(scanner, "_child", None)

    yield use
    if scanner._child:
        scanner._child.end()


def stumbling(path: str, how: str) -> str:
    """Lines with which the child comes to harm where it looks at `path`."""
    return f"""
class Stumbling(source.Object):
    def attributes(self):
        if self.path == {path!r}:
            {how}
        return super().attributes()
source.Object = Stumbling
"""


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    items = {name: random_tensors() for name in ("a", "b", "c")}
    write_dataset(tmp_path / "x.h5", items)
    return tmp_path / "x.h5", items


@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("at", ["/items/b", "/items/b/key"])
def test_a_crash_costs_the_item_at_which_it_happens(
    three: tuple[Path, dict[str, Any]], program: Program, crash: str, at: str
) -> None:
    path, items = three
    program(stumbling(at, CRASHES[crash]))
    with open_dataset(path, keep_faults=True) as dataset:
        assert [item.name for item in dataset.items] == ["a", "c"]
        (fault,) = dataset.faults
        assert fault.item == "b"
        assert crash in fault.what
        assert "/items/b" in fault.what
        assert "the file is damaged" in fault.fix
        for item in dataset.items:
            found = dataset.read(item, "value", [Span(0, 23)])
            assert same_bits(found, items[item.name]["value"])
    with pytest.raises(RejectedError, match="item 'b'"):
        open_dataset(path)
    with open_dataset(path, select="a,c") as dataset:
        assert len(dataset.items) == 2


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_at_the_root_costs_the_file(
    three: tuple[Path, dict[str, Any]], program: Program, crash: str
) -> None:
    program(stumbling("/", CRASHES[crash]))
    with pytest.raises(RejectedError, match=crash) as caught:
        open_dataset(three[0], keep_faults=True)
    assert caught.value.file == str(three[0])
    assert "the file is damaged" in caught.value.fix


def test_crashes_without_end_cost_the_file(
    three: tuple[Path, dict[str, Any]], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanner, "MAX_CRASHES", 1)
    program(stumbling("/items/b", "os.abort()") + stumbling("/items/c", "os.abort()"))
    with pytest.raises(RejectedError, match="SIGABRT"):
        open_dataset(three[0], keep_faults=True)


def test_memory_is_limited(three: tuple[Path, dict[str, Any]], program: Program) -> None:
    program(stumbling("/items/b", "import mmap; mmap.mmap(-1, scan.MEMORY_BYTES)"))
    with open_dataset(three[0], keep_faults=True) as dataset:
        assert [fault.item for fault in dataset.faults] == ["b"]
    program(stumbling("/items/b", "import mmap; mmap.mmap(-1, scan.MEMORY_BYTES // 2)"))
    with open_dataset(three[0], keep_faults=True) as dataset:
        assert not dataset.faults


def test_a_crash_while_hdf5_reads(tmp_path: Path, program: Program) -> None:
    """What only HDF5 can decode is read by a child too."""
    items = {"a": random_tensors(), "b": random_tensors()}
    write_dataset(tmp_path / "x.h5", items, How(storage={"chunks": True, "compression": "lzf"}))
    with open_dataset(tmp_path / "x.h5") as dataset:
        item = dataset.items[0]
        assert same_bits(dataset.read(item, "key", [Span(0, 23)]), items["a"]["key"])
        program(
            """
            def crash(self, *box):
                os.abort()
            source.Object.read_box = crash
            """
        )
        with pytest.raises(ItemError, match="SIGABRT") as caught:
            dataset.read(item, "key", [Span(0, 23)])
        assert caught.value.item == "a"


def test_to_mpi_the_child_is_not_there(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, no mpi4py, no core, one thread, no signals that are a rank's."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HERE_TO_STAY", "1")
    program(
        """
        import resource, signal
        scan.answer = lambda *_: ({
            "variables": list(os.environ),
            "modules": list(sys.modules),
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "session": os.getsid(0) == os.getpid(),
            "deaf": signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN,
        }, b"")
        """
    )
    found = json.loads(scanner._ask({}, [])[0])
    assert "HERE_TO_STAY" in found["variables"]
    assert not {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"} & set(found["variables"])
    assert "h5py" in found["modules"]
    assert not {"mpi4py", "mpi4py.MPI"} & set(found["modules"])
    assert found["core"] == [0, 0]
    assert found["session"]
    assert found["deaf"]


def test_a_program_that_cannot_start_says_why(
    three: tuple[Path, dict[str, Any]], program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("import no_such_module")
    with pytest.raises(RejectedError, match="No module named 'no_such_module'"):
        open_dataset(three[0])
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    monkeypatch.setattr(scanner, "_child", None)
    with pytest.raises(RejectedError, match="no process can be started"):
        open_dataset(three[0])


def test_a_child_that_nobody_asked_for_a_while_is_replaced(
    three: tuple[Path, dict[str, Any]], program: Program
) -> None:
    program("scan.IDLE_SECONDS = 0.01")
    for _ in range(3):
        open_dataset(three[0]).close()
        assert scanner._child
        scanner._child._process.wait()
    assert scanner._child._process.returncode == 0


def test_one_child_serves_many_files(three: tuple[Path, dict[str, Any]], program: Program) -> None:
    program("")
    pids = set()
    for _ in range(3):
        open_dataset(three[0]).close()
        assert scanner._child
        pids.add(scanner._child._process.pid)
    assert len(pids) == 1
    open_dataset(three[0], allow=["/tmp"]).close()  # other plugins may be loaded
    assert scanner._child._process.pid not in pids


def test_it_ends_with_the_process_that_asks(three: tuple[Path, dict[str, Any]]) -> None:
    code = (
        "import os, signal, sys; from mdattn_mpi.dataset import open_dataset, scanner\n"
        "open_dataset(sys.argv[1])\n"
        "if not os.fork(): open_dataset(sys.argv[1]); os._exit(0)\n"  # has a child of its own
        "assert os.wait()[1] == 0\n"
        "print(scanner._child._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(three[0])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    while _alive(int(done.stdout)):  # the test's timeout is the limit
        pass


def _alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


class TestCatalog:
    """What one rank's child found, another rank opens without looking."""

    @pytest.fixture(autouse=True)
    def no_hdf5(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After `scan_file` there is no child, and none of HDF5 in this process."""
        self.forbid = lambda: (
            monkeypatch.setattr(scanner, "_ask", None),
            monkeypatch.setattr(h5py.h5f, "open", None),
        )

    @pytest.mark.parametrize("storage", [{}, {"chunks": (5, 1, 7), "compression": "gzip"}])
    def test_it_is_all_that_a_rank_needs(self, tmp_path: Path, storage: dict[str, Any]) -> None:
        items = {name: random_tensors() for name in ("a2", "a10", "b")}
        attributes = {"a2": {"causal": "lower_right", "scale": 0.5}}
        write_dataset(tmp_path / "x.h5", items, How(storage=storage), attributes)
        catalog = scan_file(str(tmp_path / "x.h5"), select="a*")
        self.forbid()
        with open_dataset(tmp_path / "x.h5", select="a*", catalog=catalog) as dataset:
            assert [item.name for item in dataset.items] == ["a2", "a10"]
            assert dataset.items[0].problem.causal == "lower_right"
            for item in dataset.items:
                for name, whole in items[item.name].items():
                    spans = [Span(3, 9), Span(0, 1)]
                    cut = np.concatenate([whole[span.slice] for span in spans])
                    assert same_bits(dataset.read(item, name, spans), cut)  # type: ignore[arg-type]

    def test_so_it_is_of_named_tensors_and_of_outputs(self, tmp_path: Path) -> None:
        data, out = str(tmp_path / "x.h5"), str(tmp_path / "o.h5")
        ids = {f"i{n}": np.arange(n + 1, n + 4) for n in range(3)}
        with h5py.File(data, "w") as file:
            for name, array in ids.items():
                file[f"items/{name}/ids"] = array
        problem = ModelProblem(3, (TensorSpec("y", (3, 5), "float32"),))
        create_output(out, [ModelItem(name, n, problem) for n, name in enumerate(ids)], ranks=2)
        catalogs = {path: scan_file(path) for path in (data, out)}
        self.forbid()
        file = File(data, catalog=catalogs[data])
        assert tensor_names(file) == ["ids"]
        with open_tensors(file, [TensorSpec("ids", (-1,), "int64")], lambda _: problem) as found:
            for item in found.items:
                assert np.array_equal(found.read(item, "ids", [Span(0, 3)]), ids[item.name])
        with open_output(out, catalog=catalogs[out]) as output:
            output.allow_writing()
            item = output.items[1]
            crc32 = output.write(item, [Span(0, 3)], {"y": np.ones((3, 5), np.float32)})
            output.ledger.commit(item, [crc32], "ring", [[Span(0, 3)]])
        with open_output(out, catalog=catalogs[out]) as output:
            assert [entry.state for entry in output.ledger.entries()] == ["todo", "done", "todo"]
            assert output.read(output.items[1], "y").sum() == 15

    def test_another_file_is_noticed(self, tmp_path: Path) -> None:
        tensors = random_tensors()
        write_dataset(tmp_path / "x.h5", {"a": tensors})
        catalog = scan_file(str(tmp_path / "x.h5"))
        content = (tmp_path / "x.h5").read_bytes()
        (tmp_path / "longer.h5").write_bytes(content + b"\0")
        with pytest.raises(RejectedError, match="let all ranks see the same file"):
            open_dataset(tmp_path / "longer.h5", catalog=catalog)
        (tmp_path / "same.h5").write_bytes(content)
        at = content.index(tensors["value"].tobytes())
        (tmp_path / "other.h5").write_bytes(content[:at] + b"\x55\xaa" + content[at + 2 :])
        prints = {}
        for name in ("x", "same", "other"):
            with open_dataset(tmp_path / f"{name}.h5", catalog=catalog) as dataset:
                prints[name] = dataset.fingerprint
        assert prints["x"] == prints["same"] != prints["other"]

    def test_a_linked_file_has_a_part_in_the_fingerprint(self, tmp_path: Path) -> None:
        tensors = random_tensors()
        write_dataset(tmp_path / "x.h5", {"a": tensors})
        write_dataset(tmp_path / "y.h5", {"a": tensors})
        with h5py.File(tmp_path / "x.h5", "a") as file:
            del file["items/a/key"]
            file["items/a/key"] = h5py.ExternalLink("y.h5", "/items/a/key")
        prints = set()
        for byte in (b"", b"\0"):
            with open(tmp_path / "y.h5", "ab") as linked:
                linked.write(byte)
            with open_dataset(tmp_path / "x.h5", allow=[str(tmp_path)]) as dataset:
                prints.add(dataset.fingerprint)
        assert len(prints) == 2

    def test_system_calls_do_not_grow_with_the_items(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = []
        catalogs = []
        for count in (30, 600):
            path = tmp_path / f"{count}.h5"
            tokens = 24_000 // count
            write_dataset(
                path,
                {f"i{n}": random_tensors((tokens, tokens, 1, 1, 16, 16)) for n in range(count)},
            )
            catalogs.append((path, count, scan_file(str(path))))
        self.forbid()
        calls: Counter[str] = Counter()
        for name in ("open", "stat", "fstat", "preadv", "pread", "read", "lseek"):
            self.count(monkeypatch, calls, name)
        for path, count, catalog in catalogs:
            calls.clear()
            with open_dataset(path, catalog=catalog) as dataset:
                assert dataset.fingerprint
                assert len(dataset.items) == count
            counts.append(dict(calls))
        assert counts[0] == counts[1]
        assert counts[0]["preadv"] == FINGERPRINT_BLOCKS

    @staticmethod
    def count(monkeypatch: pytest.MonkeyPatch, calls: Counter[str], name: str) -> None:
        call = getattr(os, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return call(*arguments, **options)

        monkeypatch.setattr(os, name, counted)


def test_a_file_that_is_replaced_meanwhile(
    three: tuple[Path, dict[str, Any]], program: Program
) -> None:
    copy = f"{three[0]}.copy"
    program(
        stumbling(
            "/items/b", f"os.path.exists({copy!r}) and os.replace({copy!r}, {str(three[0])!r})"
        )
    )
    open_dataset(three[0]).close()
    Path(copy).write_bytes(three[0].read_bytes())
    with pytest.raises(RejectedError, match="was replaced while it was opened"):
        open_dataset(three[0])


def test_a_tree_of_unknown_structure(tmp_path: Path) -> None:
    """Every group is met once, so that links can't make a small file a large tree."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for level in range(30):
            file[f"g{level}/data"] = np.zeros(3)
            for name in ("one", "two"):
                if level:
                    file[f"g{level - 1}/{name}"] = file[f"g{level}"]
        file["g29/back"] = file["/"]
    with File(tmp_path / "x.h5", depth=16) as opened:
        nodes = [opened.root]
        for node in nodes:
            if node.is_group:
                nodes += filter(None, map(node.child, node.names()))
        assert sum(node.is_dataset for node in nodes) == 30


def test_relative_paths_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_dataset(Path("x.h5"), {name: random_tensors()})
        with open_dataset("x.h5") as dataset:
            assert [item.name for item in dataset.items] == [name]
