"""``mdattn build``: engines and manifests from a dataset, from shapes, from a model, adopted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mdattn_mpi.cli import main
from mdattn_mpi.cli.build import parse_problem, parse_range
from mdattn_mpi.errors import RejectedError
from tests.support.complaint import complaint
from tests.support.tensorrt import library, needs_tensorrt

SHAPES = "tokens=256:4096,heads=8/2,head_dim=64"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDATTN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sm() -> str:
    """A GPU that the library builds for from here."""
    if not library().targets:
        pytest.skip("full TensorRT builds on a GPU only")
    return "8.6"


def build(path: Path, *arguments: str) -> int:
    return main(["build", "-o", str(path), *arguments])


@needs_tensorrt
def test_from_shapes_and_from_the_cache(
    tmp_path: Path, sm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mdattn_mpi.trt.store import read_engine

    path = tmp_path / "attn.engine"
    arguments = ("--problem", SHAPES, "-n", "4", "-s", "ulysses", "--sm", sm)
    assert build(path, *arguments) == 0
    assert "ulysses on 4 ranks, 8/2 heads of 64, bfloat16" in capsys.readouterr().out
    engine, manifest = read_engine(path)
    assert (manifest.sm, manifest.ranks, manifest.size) == ((8, 6), 4, len(engine))
    again = tmp_path / "again.engine"
    assert build(again, *arguments) == 0
    assert "; from the cache in" in capsys.readouterr().out
    assert again.read_bytes() == engine
    assert build(again, *arguments, "--no-cache", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 4


@needs_tensorrt
def test_from_a_dataset_of_many_lengths(
    tmp_path: Path, sm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mdattn_mpi.trt.store import read_engine

    data = str(tmp_path / "data.h5")
    make = ["make-data", data, "--items", "5", "--lengths", "100:400", "--q-heads", "4"]
    assert main([*make, "--kv-heads", "2", "--head-dim", "32", "--dtype", "fp16"]) == 0
    path = tmp_path / "attn.engine"
    assert build(path, data, "-n", "2", "-s", "allgather", "--sm", sm) == 0
    _, manifest = read_engine(path)
    spec = manifest.attention()
    assert spec.dtype == "float16"
    assert 1 <= spec.q.min < spec.q.max <= 200


@needs_tensorrt
def test_an_engine_from_elsewhere_is_adopted_on_purpose(
    tmp_path: Path, sm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mdattn_mpi.trt.store import read_engine

    theirs, ours = tmp_path / "theirs.engine", tmp_path / "ours.engine"
    theirs.write_bytes(b"serialized elsewhere")
    with pytest.raises(RejectedError, match="native code"):
        read_engine(theirs)
    arguments = ("--problem", SHAPES, "-n", "4", "-s", "allgather", "--sm", sm)
    assert build(ours, "--adopt", str(theirs), *arguments) == 0
    engine, manifest = read_engine(ours)
    assert engine == b"serialized elsewhere"
    assert manifest.attention().strategy == "allgather"
    assert "adopted" in capsys.readouterr().out


@needs_tensorrt
@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        ((), "what is to be built?", 2),
        (("--problem", SHAPES, "--onnx", "m.onnx"), "what is to be built?", 2),
        (("--problem", SHAPES, "-n", "0"), "-n 0", 2),
        (("--problem", SHAPES, "-s", "star"), "strategy 'star'", 2),
        (("--problem", SHAPES, "--sm", "hopper"), "no compute capability", 2),
        (("--problem", SHAPES, "-n", "3", "-s", "ulysses"), "don't divide among 3 ranks", 2),
        (("--problem", "tokens=8"), "--problem without 'heads'", 2),
        (("--adopt", "none.engine", "--problem", SHAPES), "cannot read the engine", 2),
        (("--onnx", "m.onnx"), "--onnx without --tokens", 2),
        (("--onnx", "m.onnx", "--tokens", "9:3"), "isn't a range of lengths", 2),
        (("--onnx", "m.onnx", "--tokens", "9"), "cannot read the model", 2),
        (("nowhere.h5",), "nowhere.h5", 2),
    ],
)
def test_refusals(
    tmp_path: Path,
    sm: str,
    arguments: tuple[str, ...],
    told: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "attn.engine"
    assert build(path, "-n", "2", "-s", "allgather", "--sm", sm, *arguments) == code
    assert told in complaint(capsys)
    assert not path.exists()


@needs_tensorrt
def test_a_gpu_that_cannot_run_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if library().flavour != "tensorrt_rtx":
        pytest.skip("full TensorRT knows them all")
    arguments = ("--problem", SHAPES, "-n", "2", "-s")
    assert build(tmp_path / "a", *arguments, "allgather", "--sm", "9.0") == 2
    assert "can't build for SM 9.0 from here" in complaint(capsys)
    assert build(tmp_path / "a", *arguments, "ring", "--sm", "12.0") == 4
    error = complaint(capsys)
    assert "SM 12.0" in error
    assert "full TensorRT since SM 10.0" in error


def test_parse_problem() -> None:
    problems, ranged = parse_problem("q_tokens=5,kv_tokens=7:9,heads=4,head_dim=8,dtype=fp16")
    assert ranged
    assert [(p.q_tokens, p.kv_tokens) for p in problems] == [(5, 7), (5, 9)]
    assert {(p.q_heads, p.kv_heads, p.dtype) for p in problems} == {(4, 4, "float16")}
    problems, ranged = parse_problem("tokens=5,heads=4/2,head_dim=8,causal=lower_right,scale=0.5")
    assert not ranged
    assert (problems[0].scale, problems[0].causal) == (0.5, "lower_right")


@pytest.mark.parametrize(
    "text",
    [
        "", "tokens", "tokens=x,heads=1,head_dim=1", "tokens=9:1,heads=1,head_dim=1",
        "size=4", "tokens=4,heads=3/2,head_dim=8", "tokens=4,heads=1,head_dim=999",
        "tokens=4,heads=1,head_dim=8,dtype=fp8", "tokens=4,heads=1,head_dim=8,causal=maybe",
    ],
)  # fmt: skip
def test_what_is_no_problem(text: str) -> None:
    with pytest.raises(RejectedError):
        parse_problem(text)


def test_parse_range() -> None:
    assert parse_range("7") == (7, 7)
    assert parse_range("7:9") == (7, 9)
    for wrong in ("", "0", "9:7", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match=r"range|int"):
            parse_range(wrong)


def test_what_the_library_is_known_for() -> None:
    from types import SimpleNamespace

    from mdattn_mpi.cli.build import known_faults
    from mdattn_mpi.problem import AttentionProblem
    from mdattn_mpi.trt.choice import spec_for
    from mdattn_mpi.trt.library import Library
    from mdattn_mpi.trt.store import describe

    problem = AttentionProblem(64, 64, 8, 8, 64, 64, "float16")
    (spec,) = spec_for([problem], "allgather", 2)

    def told(flavour: str, version: str) -> str:
        found = Library(flavour, version, SimpleNamespace())  # type: ignore[arg-type]
        return "\n".join(known_faults(describe(b"", found, (9, 0), spec)))

    old = told("tensorrt", "11.0.0.114")
    assert "single-device engine" in old
    assert "#4388); a way round is built in" in old
    assert "release notes); use TensorRT 11.3 or later, --dtype bf16" in old
    assert "cast up" in told("tensorrt", "11.3.0")
    assert not told("tensorrt_rtx", "1.7.1.116")
