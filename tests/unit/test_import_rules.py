"""Who may import what, proved from the source; and the package imports on a bare machine."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "mdattn_mpi"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself, errors, files, mask, problem, text and what stands here (with all
# below it).
ROOMS: dict[str, set[str]] = {
    "__init__": {"library", "dataset"},
    "__main__": {"cli", "lockstep"},
    "errors": set(),
    "files": set(),
    "mask": set(),
    "problem": set(),
    "text": set(),
    "partition": set(),
    "costs": set(),
    "estimate": {"costs", "partition"},
    "planning": {"estimate", "partition"},
    "lockstep": set(),
    "dataset": set(),
    "devices": {"estimate", "lockstep", "partition"},
    "strategies": {"devices.protocol", "estimate", "partition"},
    "trt": {
        "onnx",
        "partition",
        "lockstep",
        "devices.nccl",
        "devices.presence",
        "devices.cuda.driver",
        "devices.cuda.memory",
        "verifier",  # an engine is proven before it is used
    },
    "backends": {"partition", "devices", "strategies", "trt", "lockstep"},
    "slurm": set(),
    "verifier": {"dataset", "models.folder", "models.load"},
    "library": {"partition", "devices.protocol", "strategies", "lockstep", "backends"},
    "corpus": {"dataset"},
    "models": {
        "library.arrays",
        "estimate",
        "partition",
        "devices",
        "strategies",
        "lockstep",
        "backends",
    },
    "transformers": {"models", "library", "lockstep", "partition"},
    "runner": {
        "planning",
        "estimate",
        "partition",
        "devices",
        "dataset",
        "lockstep",
        "backends",
        "trt",
        "models",
        "onnx",
    },
    "report": {"dataset", "lockstep", "runner"},
    "doctor": {"devices", "lockstep", "trt.versions"},
    "cli": {
        "planning",
        "estimate",
        "doctor",
        "partition",
        "devices",
        "dataset",
        "lockstep",
        "backends",
        "trt",
        "runner",
        "report",
        "verifier",
        "onnx",
        "bench",
        "slurm",
        "models",
        "corpus",
    },
    "bench": {
        "planning",
        "partition",
        "estimate",
        "devices",
        "dataset",
        "lockstep",
        "backends",
        "strategies",  # it times them
        "runner",
        "models",
        "verifier",
    },
    "onnx": set(),
}

# Outside packages that not every room may import: the rooms (or modules) that may.
ONLY: dict[str, set[str]] = {
    "mpi4py": {"lockstep"},
    "h5py": {
        "dataset.scan",  # a process of its own, the only one that reads by h5py
        "dataset.source",
        "dataset.hdf5_types",
        "dataset.writer",
    },
    "tensorrt": {"trt"},
    "tensorrt_rtx": {"trt"},
    "cudnn": {"devices"},
    "nccl": {"devices", "trt"},
    "cuda": {"devices", "trt"},
    "cutlass": {"devices.cuda.flash"},
    "flash_attn": {"devices.cuda.flash"},
    "quack": {"devices.cuda.flash"},
    "tvm_ffi": {"devices.cuda.flash"},
    "threadpoolctl": {"devices", "verifier"},
    "torch": {
        "bench.attention_cpu",
        "bench.attention_cuda",
        "bench.rivals",
        "bench.kernels",
        "bench.model",
        "bench.model_rival",
        "dataset.foreign.torch_file",
        "devices.cuda.interop",
        "models",
        "verifier.transformer",
    },
    "transformers": {"models", "bench.model", "corpus.tokenizer"},
    "pyarrow": {"corpus.texts"},
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
}


class Import(NamedTuple):
    """One import: where it stands, of what, and whether it runs with the module itself."""

    module: str
    target: str
    eager: bool
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def name_of(file: Path) -> str:
    """The module's name inside the package, such as ``devices.cpu``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports_of(module: str, source: str, *, for_types: bool = False) -> Iterator[Import]:
    """All imports, `import_module("x")` too, but those for type checkers alone if not wanted."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.If) and typing and not for_types:
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, eager, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                yield Import(module, f"{node.module}.{alias.name}", eager, node.lineno)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            literal = node.args[0]
            if called in ("import_module", "__import__") and isinstance(literal, ast.Constant):
                yield Import(module, str(literal.value), eager, node.lineno)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in children:
            yield from visit(child, eager and not lazy)

    yield from visit(ast.parse(source), True)


def all_imports() -> list[Import]:
    return [found for file in FILES for found in imports_of(name_of(file), file.read_text())]


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def violations(imports: list[Import]) -> list[str]:
    wrong = []
    for found in imports:
        room = found.module.partition(".")[0]
        top, _, inside = found.target.partition(".")
        if top == "mdattn_mpi":
            everyones = {"errors", "files", "mask", "problem", "text", "__version__"}
            allowed = {room, *everyones, *ROOMS[room]}
            if room == "strategies" and found.module != "strategies":
                allowed -= {"strategies"}  # never each other
            if not within(inside, allowed):
                wrong.append(str(found))
        elif top in ONLY and not within(found.module, ONLY[top]):
            wrong.append(str(found))
    return wrong


def circles(imports: list[Import]) -> set[frozenset[str]]:
    """Modules that import each other, directly or by way of others, in whatever way they do."""
    modules = {found.module for found in imports}
    graph: dict[str, set[str]] = {module: set() for module in (*modules, "__init__")}
    for found in imports:
        package, _, target = found.target.partition(".")
        while target and target not in modules:  # a name in a module
            target = target.rpartition(".")[0]
        if package == "mdattn_mpi":
            graph[found.module].add(target or "__init__")

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    reach = {module: reached(module) for module in graph}
    return {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }


def test_no_modules_import_each_other() -> None:
    """Lazy imports and those for type checkers count: who reads one module must read the other."""
    imports = [
        found
        for file in FILES
        for found in imports_of(name_of(file), file.read_text(), for_types=True)
    ]
    assert circles(imports) == set()


@pytest.mark.parametrize(
    "back",
    [
        "from mdattn_mpi import b",
        "from mdattn_mpi.b import name",
        "def f():\n    import mdattn_mpi.b",
        "if TYPE_CHECKING:\n    from mdattn_mpi.b import Name",
        "from mdattn_mpi.c import x",
    ],
)
def test_a_circle_is_found(back: str) -> None:
    sources = {"a": back, "b": "from mdattn_mpi import a", "c": "from mdattn_mpi.b import y"}
    imports = [
        found
        for module, source in sources.items()
        for found in imports_of(module, source, for_types=True)
    ]
    assert any({"a", "b"} <= circle for circle in circles(imports))
    assert not circles([found for found in imports if found.module != "a"])


def test_every_room_has_its_rules() -> None:
    assert {name_of(file).partition(".")[0] for file in FILES} <= set(ROOMS)


def test_the_rules_hold() -> None:
    assert violations(all_imports()) == []


@pytest.mark.parametrize(
    "room", ["errors", "files", "mask", "problem", "text", "partition", "estimate", "strategies"]
)
def test_what_is_arithmetic_needs_the_standard_library_alone(room: str) -> None:
    for found in all_imports():
        if within(found.module, {room}):
            assert found.target.partition(".")[0] in {"mdattn_mpi", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("strategies.ring", "from mdattn_mpi.devices.cpu.device import CpuDevice"),
        ("strategies.ring", "from mdattn_mpi.strategies import ulysses"),
        ("strategies.ring", "import mdattn_mpi.lockstep"),
        ("verifier.check", "from mdattn_mpi.strategies import ring"),
        ("verifier.check", "def f():\n    from mdattn_mpi import devices"),
        ("devices.cpu", "from mpi4py import MPI"),
        ("devices.cpu", "import mpi4py.MPI"),
        ("runner.loop", "def f():\n    import h5py"),
        ("dataset.reader", "import h5py"),
        ("backends", "import_module('tensorrt')"),
        ("backends", "importlib.import_module('tensorrt_rtx')"),
        ("runner.loop", "import pickle"),
        ("devices.cuda.kernels", "def f():\n    from flash_attn.cute import interface"),
        ("dataset.reader", "from mdattn_mpi.partition import split"),
    ],
)
def test_a_breach_is_found(module: str, source: str) -> None:
    assert violations(list(imports_of(module, source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("devices.cpu", "if TYPE_CHECKING:\n    from mpi4py import MPI"),
        ("strategies.ring", "from mdattn_mpi.devices.protocol import Device"),
        ("strategies", "from mdattn_mpi.strategies import ring"),
        ("lockstep.world", "from mpi4py import MPI"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert not violations(list(imports_of(module, source)))


def python(source: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=PACKAGE.parent,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Nothing but the standard library and itself; above all MPI isn't initialized."""
    loaded = python("""
        import sys
        before = set(sys.modules)
        import mdattn_mpi
        print(*(set(sys.modules) - before))
    """).split()
    assert "mdattn_mpi" in loaded
    tops = {name.partition(".")[0] for name in loaded}
    assert tops - {"mdattn_mpi"} <= set(sys.stdlib_module_names)


BARE = """
    import sys
    from importlib import import_module

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {absent}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Absent())
    for module in {modules}:
        import_module(module)
    print("good")
"""


def test_every_module_imports_without_gpu_libraries() -> None:
    absent = {"cuda", "cudnn", "nccl", "tensorrt", "tensorrt_rtx", "torch", "onnx", "safetensors"}
    absent |= {"cutlass", "flash_attn", "quack", "tvm_ffi"}
    on_demand = ("__main__", "devices.cuda", "devices.cudnn", "devices.nccl")
    modules = [
        f"mdattn_mpi.{name_of(file)}" for file in FILES if not name_of(file).startswith(on_demand)
    ]
    assert "mdattn_mpi.backends" in modules
    assert "mdattn_mpi.strategies.ring" in modules
    assert python(BARE.format(absent=absent, modules=modules)).strip() == "good"


def test_the_library_imports_without_mpi_and_hdf5() -> None:
    modules = ["mdattn_mpi.library", "mdattn_mpi.strategies"]
    assert python(BARE.format(absent={"mpi4py", "h5py"}, modules=modules)).strip() == "good"


def test_the_package_says_what_it_does_not_have() -> None:
    import mdattn_mpi

    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        _ = mdattn_mpi.attend  # type: ignore[attr-defined]
    assert callable(mdattn_mpi.attention)
    assert mdattn_mpi.shard_spans(10, 1, 2)[0].start == 5
