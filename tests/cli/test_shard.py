"""``mdattn shard``: the commands of docs/onnx.md, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.cli.shard import parse_axes
from mdattn_mpi.errors import RejectedError
from tests.support.complaint import complaint
from tests.support.tensorrt import library, needs_tensorrt

pytest.importorskip("onnx", reason="the package onnx isn't installed")

MAKE = Path(__file__).resolve().parents[2] / "docs" / "make_attention_block.py"


@pytest.fixture
def block(tmp_path: Path) -> Path:
    path = tmp_path / "block.onnx"
    small = ["--heads", "8", "--kv-heads", "2", "--head-dim", "16"]
    subprocess.run([sys.executable, MAKE, path, *small], check=True, timeout=60)
    return path


@needs_tensorrt
def test_shard_and_build(block: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mdattn_mpi.trt.store import read_engine

    sharded, engine = tmp_path / "sharded.onnx", tmp_path / "block.engine"
    assert main(["shard", str(block), "-n", "2", "-s", "allgather", "-o", str(sharded)]) == 0
    told = capsys.readouterr().out
    assert "node 'attention' (Attention): keys and values gathered from 2 ranks" in told
    assert "tokens in hidden:0, output:0" in told
    if not library().targets:
        pytest.skip("full TensorRT builds on a GPU only")
    build = ["build", "--onnx", str(sharded), "-o", str(engine), "--sm", "8.6", "-n"]
    assert main([*build, "2", "--tokens", "64:4096"]) == 0
    _, manifest = read_engine(engine)
    assert (manifest.strategy, manifest.ranks, manifest.spec) == ("allgather", 2, {})
    assert manifest.axes == {"hidden": 0, "output": 0}
    there = find_spec("onnxruntime") is not None  # what is known of it lies beside
    assert bool(manifest.known) == (tmp_path / "block.engine.known.npz").exists() == there
    assert ("it can't be proven before it runs" in capsys.readouterr().out) != there
    capsys.readouterr()
    assert main([*build, "4", "--tokens", "64:4096"]) == 2
    assert "sharded for 2 ranks, -n says 4" in complaint(capsys)
    assert main(["build", "--onnx", str(block), "-o", "x", "--sm", "8.6", "-n", "2",
                 "--tokens", "9"]) == 2  # fmt: skip
    assert "how it is sharded" in complaint(capsys)


def test_ring_marks_the_attention(
    block: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    sharded = tmp_path / "sharded.onnx"
    command = ["shard", str(block), "-n", "4", "-s", "ring", "-o", str(sharded), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["axes"] == {"hidden": 0, "output": 0}
    (node,) = [n for n in onnx.load(sharded).graph.node if n.op_type == "Attention"]
    assert [(a.name, a.i) for a in node.attribute] == [("nb_rank", 4)]


def test_check_and_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A float32 model is refused, or cast; and held against the whole one where that can be."""
    pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")
    from mdattn_mpi.onnx import ranks
    from tests.support.onnx_decoder import decoder

    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    path.write_bytes(decoder().SerializeToString())
    command = ["shard", str(path), "-n", "3", "-s", "allgather", "-o", str(out)]
    assert main(command) == 2
    assert "attentions are in float32" in complaint(capsys)
    assert main([*command, "--dtype", "fp16"]) == 0
    told = capsys.readouterr().out
    assert "in float32: checked with ONNX Runtime on 67 tokens: right" in told
    assert "in float16: checked with ONNX Runtime on 67 tokens: right" in told
    out.unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranks, "exchange", ranks.forget)
        assert main([*command, "--dtype", "fp32"]) == 1
        assert not out.exists()
        assert "nothing was written" in capsys.readouterr().err
        assert main([*command, "--dtype", "fp32", "--no-check"]) == 0
    assert out.exists()


def test_until(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pooled model is refused, and told where to end; ended there it is sharded."""
    onnx = pytest.importorskip("onnx", reason="the package onnx isn't installed")
    pytest.importorskip("onnxruntime", reason="the extra `fast` isn't installed")
    from tests.support.onnx_decoder import decoder

    model = decoder()
    model.graph.node.append(onnx.helper.make_node("ReduceMean", ["out"], ["mean"], axes=[1]))
    model.graph.output[0].name = "mean"
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    path.write_bytes(model.SerializeToString())
    command = ["shard", str(path), "-n", "3", "-s", "allgather", "--dtype", "fp32", "-o", str(out)]
    assert main(command) == 2
    told = complaint(capsys)
    assert "'mean' (ReduceMean) works along the tokens" in told
    assert "end the model before it: mdattn shard … --until 'out'" in told
    assert main([*command, "--until", "out"]) == 0
    assert "67 tokens: right" in capsys.readouterr().out
    assert [value.name for value in onnx.load(out).graph.output] == ["out"]
    assert main([*command, "--until", "nothing"]) == 2
    assert "--until 'nothing': no node of the model makes such a tensor" in complaint(capsys)


def test_refusals(block: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.onnx")
    junk = tmp_path / "junk.onnx"
    junk.write_text("junk")
    for arguments, told in (
        ([str(block), "-n", "3", "-s", "ulysses"], "block.onnx: node 'attention' (Attention) has"),
        ([str(block), "-n", "0", "-s", "ring"], "-n 0"),
        ([str(block), "-n", "2", "-s", "ring", "--shard", "hidden"], "--shard 'hidden'"),
        ([str(block), "-n", "2", "-s", "ring", "--shard", "hiden:0"], "an input 'hiden'"),
        ([str(junk), "-n", "2", "-s", "ring"], "not an ONNX file"),
        ([str(tmp_path / "none"), "-n", "2", "-s", "ring"], "cannot read the model"),
    ):
        assert main(["shard", *arguments, "-o", out]) == 2
        assert told in complaint(capsys)
    assert not Path(out).exists()
    assert main(["shard", str(block), "-n", "2", "-s", "ring", "-o", str(block)]) == 2
    assert "the output is the model itself" in complaint(capsys)


def test_parse_axes() -> None:
    assert parse_axes(["hidden:0", "a:b:-2"]) == {"hidden": 0, "a:b": -2}
    for wrong in ("hidden", ":0", "hidden:x", "hidden:"):
        with pytest.raises(RejectedError, match="--shard"):
            parse_axes([wrong])
