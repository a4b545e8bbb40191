"""The program in docs/onnx.md exports a folder of Hugging Face, and what it writes is sharded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for package, extra in (
    ("onnx", "onnx"),
    ("onnxruntime", "fast"),
    ("transformers", "transformers"),
    ("onnxscript", "onnxscript, which PyTorch's exporter needs"),
):
    pytest.importorskip(package, reason=f"not installed: {extra}")

from mdattn_mpi.onnx.compare import compare  # noqa: E402
from mdattn_mpi.onnx.model import load_model, operator  # noqa: E402
from mdattn_mpi.onnx.shard import shard_model  # noqa: E402
from mdattn_mpi.onnx.sharding import read_sharding  # noqa: E402
from tests.support.tiny_models import tiny_model  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs/onnx.md"
(PROGRAM,) = re.findall(r"```python\n# export.py\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_export(tmp_path: Path) -> None:
    (tmp_path / "export.py").write_text(PROGRAM)
    words = [sys.executable, "export.py", str(tiny_model("llama")), "model.onnx"]
    done = subprocess.run(
        words, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    off = re.search(r"model.onnx: off by (\S+) from PyTorch", done.stdout)
    assert off, done.stdout
    assert float(off[1]) < 1e-4
    path = tmp_path / "model.onnx"
    model = load_model(path)
    attentions = [node for node in model.graph.node if operator(node) == "Attention"]
    assert [len(node.input) for node in attentions] == [3, 3, 3]
    sharded, _ = shard_model(model, "allgather", 3, {})
    found = compare(model, path, sharded, read_sharding(sharded, path))
    assert found.verdict == "right", found


def test_a_window_is_not_lost() -> None:
    """What the function of the program can't do, it refuses."""
    found: dict[str, Any] = {}
    exec(PROGRAM.split("class Hidden")[0], found)
    with pytest.raises(SystemExit, match="it has sliding_window"):
        found["plain"](None, None, None, None, sliding_window=6)
