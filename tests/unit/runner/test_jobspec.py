"""What a job file and the command line may say, and what they may not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdattn_mpi.cli import run
from mdattn_mpi.errors import RejectedError
from mdattn_mpi.runner.attention import Attention
from mdattn_mpi.runner.jobspec import MAX_JOB_FILE, JobSpec, load_job_file


def job_file(folder: Path, text: str | bytes) -> str:
    path = folder / "job.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def parsed(*arguments: str) -> JobSpec:
    parser = argparse.ArgumentParser()
    run.add_options(parser)
    spec: JobSpec = run.spec_of(parser.parse_args(arguments))
    return spec


def test_paths_in_a_job_file_are_relative_to_it(tmp_path: Path) -> None:
    path = job_file(tmp_path, 'data = "a.h5"\noutput = "b/out.h5"\nmax_time = 60\n')
    fields = load_job_file(path)
    assert fields["data"] == str(tmp_path / "a.h5")
    assert fields["output"] == str(tmp_path / "b/out.h5")
    assert JobSpec(**fields).max_time == 60


def test_the_command_line_goes_before_the_job_file(tmp_path: Path) -> None:
    path = job_file(tmp_path, 'data = "a.h5"\noutput = "o.h5"\nstrategy = "ring"\nlse = true\n')
    spec = parsed("--job", path, "-s", "ulysses", "-o", "other.h5")
    assert (spec.strategy, spec.output, spec.lse) == ("ulysses", "other.h5", True)


def options(*arguments: str) -> dict[str, str]:
    """What decides the bytes of the output."""
    return Attention(parsed(*arguments), cast(Any, None)).options()


def test_what_is_ignored(tmp_path: Path) -> None:
    path = job_file(tmp_path, 'data = "a.h5"\noutput = "o.h5"\nignore = ["sinks", "window"]\n')
    assert parsed("--job", path).ignore == ("sinks", "window")
    again = options("--job", path, "--ignore", "window,sinks", "--ignore", "window")
    assert again == options("--job", path)
    assert again != options("a.h5", "-o", "o.h5")


def test_what_decides_the_bytes(tmp_path: Path) -> None:
    engine = tmp_path / "x.engine"
    engine.write_bytes(b"native code")
    plain = options("a.h5", "-o", "o.h5")
    for name, *changed in (
        ("strategy", "-s", "ring"),
        ("kernel", "--kernel", "flash"),
        ("transfer", "--transfer", "nccl"),
        ("engine", "--engine", str(engine)),
        ("lse", "--lse"),
    ):
        found = options("a.h5", "-o", "o.h5", *changed)
        assert {n for n, value in found.items() if value != plain[n]} == {name}
    before = options("a.h5", "-o", "o.h5", "--engine", str(engine))
    moved = engine.rename(tmp_path / "moved.engine")
    assert options("a.h5", "-o", "o.h5", "--engine", str(moved)) == before


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("data = [", "TOML"),
        (b"\xff\xfe", "TOML"),
        ("surprise = 1", "surprise"),
        ("lse = 1", "true or false"),
        ("data = 3", "a string"),
        ("threads = 1.5", "whole number"),
        ('allow = "/"', "list of strings"),
        ("allow = [1]", "list of strings"),
        ('ignore = "window"', "list of strings"),
        ("x = " + "[" * 5000 + "]" * 5000, "TOML"),
        ("#" * (MAX_JOB_FILE + 1), "bytes"),
    ],
)
def test_bad_job_files(text: str | bytes, word: str, tmp_path: Path) -> None:
    path = job_file(tmp_path, text)
    with pytest.raises(RejectedError, match=word) as refused:
        load_job_file(path)
    assert refused.value.file == path
    assert refused.value.fix


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="No such file"):
        load_job_file(str(tmp_path / "none.toml"))


@given(st.binary(max_size=200))
def test_no_job_file_can_do_more_than_be_refused(tmp_path_factory, text: bytes) -> None:
    path = job_file(tmp_path_factory.mktemp("job"), text)
    try:
        fields = load_job_file(path)
    except RejectedError:
        return
    assert set(fields) <= set(JobSpec.__dataclass_fields__)


@pytest.mark.parametrize(
    "fields",
    [
        {"backend": "gpu"},
        {"strategy": "tree"},
        {"layout": "columns"},
        {"nonfinite": "maybe"},
        {"threads": -1},
        {"deadline": -1.0},
        {"group_size": "-2"},
        {"group_size": "some"},
        {"output": "./data.h5"},
    ],
)
def test_bad_values(fields: dict[str, object]) -> None:
    with pytest.raises(RejectedError) as refused:
        JobSpec(**{"data": "data.h5", "output": "out.h5", **fields})  # type: ignore[arg-type]
    assert refused.value.fix


@pytest.mark.parametrize("seconds", [1.001, 60.0, float("inf"), float("nan")])
def test_no_more_than_a_second_of_finished_items_may_be_lost(seconds: float) -> None:
    with pytest.raises(RejectedError, match=f"commit_every is {seconds:g} s") as refused:
        JobSpec("data.h5", "out.h5", commit_every=seconds)
    assert "use 1 (second) at most" in refused.value.fix
    assert JobSpec("data.h5", "out.h5", commit_every=1.0).commit_every == 1  # the fix works


def test_dataset_and_output_must_be_named() -> None:
    with pytest.raises(RejectedError, match="no output"):
        parsed("a.h5")
    with pytest.raises(RejectedError, match="no data"):
        parsed("-o", "a.h5")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("15m", 900), ("2h", 7200), ("1-00:00:01", 86401), ("02:30", 150)],
)
def test_durations(text: str, seconds: float) -> None:
    assert run.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5", "1:x", "inf", "nan", "1e999", "3w"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        run.duration(text)
