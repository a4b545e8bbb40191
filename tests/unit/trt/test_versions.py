"""What is known of which version of TensorRT, and what follows from it."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi.errors import DeviceError
from mdattn_mpi.trt import versions
from mdattn_mpi.trt.library import Library, Log
from mdattn_mpi.trt.versions import FAULTS, Form, faults_of, form_for, parse_version, recognize


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("11.2.0.86-md-moe-ep", (11, 2, 0, 86)), ("11.3", (11, 3)), ("nightly", ()), ("11.", (11,))],
)
def test_versions_are_read(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


@pytest.mark.parametrize(
    ("version", "strategy", "dtype", "ranks", "form"),
    [
        ("11.0.0.114", "allgather", "bfloat16", 2, Form(border=True)),
        ("11.0.0.114", "allgather", "bfloat16", 1, Form()),
        ("11.0.0.114", "ring", "bfloat16", 2, Form()),
        ("11.3.0", "ring", "float16", 2, Form(wide=True)),
        ("11.3.0", "ring", "float16", 1, Form(wide=True)),
        ("11.3.0", "ulysses", "float16", 2, Form(wide=True)),
        ("11.2.3", "ring", "float16", 2, Form()),
    ],
)
def test_the_form_of_a_network(
    version: str, strategy: str, dtype: str, ranks: int, form: Form
) -> None:
    assert form_for("tensorrt", version, strategy, dtype, ranks) == form
    assert form_for("tensorrt_rtx", "1.7.1.116", strategy, dtype, ranks) == Form()


def names(version: str, *used: str) -> set[str]:
    return {fault.name for fault in faults_of("tensorrt", version, *used)}


def test_faults_by_version_strategy_and_dtype() -> None:
    assert "single-device engine" in names("11.1.0", "ulysses", "bfloat16")
    assert "single-device engine" not in names("11.1.0", "ring", "bfloat16")
    assert "single-device engine" not in names("11.2.0.86")
    assert "ignored groups" in names("11.2.1.2")
    assert "ignored groups" not in names("11.2.0.86")
    assert "ignored groups" not in names("11.2.1.2", "allgather")  # no network of ours has any
    assert "FP16 accumulation" in names("11.2.1", "ring", "float16")
    assert "FP16 accumulation" not in names("11.2.1", "ring", "bfloat16")
    assert not list(faults_of("tensorrt_rtx", "1.7.1.116"))
    assert not names("10.9")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("mIsMdEngine == true failed: The engine is not a multi-device engine", "single-device"),
        ("CollectiveOperation not supported for collective In toMyelinCommKind", "fused"),
        ("Myelin get_nccl_comm] Invalid communicator ID: 0 In execute", "lost communicator"),
        ("Did not properly set the child communicator.", "ignored groups"),
    ],
)
def test_an_error_is_explained_by_its_words(words: str, name: str) -> None:
    fault = recognize(words, "tensorrt", "11.2.1")
    assert fault is not None
    assert fault.name.startswith(name)
    assert recognize("out of memory", "tensorrt", "11.2.1") is None


def log(version: str) -> Any:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        def __init__(self) -> None:
            pass

    ILogger.Severity = Severity  # type: ignore[attr-defined]
    return Log(Library("tensorrt", version, SimpleNamespace(ILogger=ILogger)))


def test_a_builder_that_fails_as_known_says_so() -> None:
    found = log("11.0.0.114")
    assert not found.complains
    found.sink.log(2, "a warning")
    assert not found.complains
    found.sink.log(1, "Skipping tactic: CollectiveOperation not supported in toMyelinCommKind")
    assert found.complains
    error = found.error("TensorRT built no engine", "use something")
    assert isinstance(error, DeviceError)
    assert "toMyelinCommKind" in error.what
    assert "tensorrt 11.0.0.114 may have fused collective" in error.what
    assert "4381" in error.what
    assert "another strategy" in error.fix
    other = log("11.4")
    other.sink.log(1, "out of memory")
    assert other.error("no", "use something").fix == "use something"


def test_the_table_is_whole() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert versions.fault_named(fault.name) is fault
        assert fault.source
        assert fault.fix
        assert fault.fixed is None or fault.since < fault.fixed
        re.compile(fault.words)
