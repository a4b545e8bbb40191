"""Which TensorRT is there, what it can do, what it says; and which NCCL."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi.devices.nccl import loaded_nccl
from mdattn_mpi.errors import DeviceError, RejectedError
from mdattn_mpi.trt import library as room
from mdattn_mpi.trt.library import (
    Library,
    Log,
    check_one_nccl,
    find_library,
    parse_sm,
)
from tests.support.tensorrt import library, needs_tensorrt


class Names:
    SM75 = SM80 = SM86 = SM89 = SM120 = 0
    CURRENT = NONE = 0


FULL = Library("tensorrt", "11.4.1", SimpleNamespace(ComputeCapability=Names))
RTX = Library("tensorrt_rtx", "1.7.1.116", SimpleNamespace(ComputeCapability=Names))


def importer(**modules: Any) -> Any:
    def import_module(name: str) -> Any:
        if isinstance(modules.get(name), Exception):
            raise modules[name]
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return modules[name]

    return import_module


def module(version: str, *layers: str) -> Any:
    network = type("INetworkDefinition", (), dict.fromkeys(layers))
    return SimpleNamespace(__version__=version, INetworkDefinition=network)


def test_the_full_library_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    full = module("11.4.1", "add_dist_collective")
    rtx = module("1.7.1", "add_dist_collective")
    monkeypatch.setattr(room, "import_module", importer(tensorrt=full, tensorrt_rtx=rtx))
    assert str(find_library()) == "tensorrt 11.4.1"


def test_one_that_is_too_old_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    old, rtx = module("10.3.0"), module("1.7.1", "add_dist_collective")
    monkeypatch.setattr(room, "import_module", importer(tensorrt=old, tensorrt_rtx=rtx))
    assert find_library().flavour == "tensorrt_rtx"


def test_none_names_both_extras_and_what_each_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ImportError("libnvinfer.so.11: cannot open shared object file")
    monkeypatch.setattr(room, "import_module", importer(tensorrt=broken))
    with pytest.raises(RejectedError) as caught:
        find_library()
    assert "libnvinfer.so.11" in caught.value.what
    assert "tensorrt_rtx is not installed" in caught.value.what
    for part in ("[tensorrt]", "[tensorrt-rtx]", "SM 8.0", "12.x"):
        assert part in caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("found", "sm", "strategies"),
    [
        (FULL, (7, 5), ()),
        (FULL, (8, 0), ("allgather", "ulysses")),
        (FULL, (9, 0), ("allgather", "ulysses")),
        (FULL, (10, 0), ("ring", "allgather", "ulysses")),
        (FULL, (12, 0), ("ring", "allgather", "ulysses")),
        (RTX, (7, 5), ()),
        (RTX, (8, 6), ("allgather", "ulysses")),
        (RTX, (9, 0), ()),
        (RTX, (10, 0), ()),
        (RTX, (12, 0), ("allgather", "ulysses")),
    ],
)
def test_capabilities(found: Library, sm: tuple[int, int], strategies: tuple[str, ...]) -> None:
    can = found.capabilities(sm)
    assert can.strategies == strategies
    assert bool(can.reason) == (len(strategies) < 3)


def test_only_rtx_builds_for_gpus_that_are_elsewhere() -> None:
    assert FULL.targets == ()
    assert RTX.targets == ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0))


@needs_tensorrt
def test_targets_of_the_real_library() -> None:
    found = library()
    if found.flavour == "tensorrt_rtx":
        assert {(8, 0), (8, 6), (8, 9), (12, 0)} <= set(found.targets)
        assert (9, 0) not in found.targets


@needs_tensorrt
def test_its_words_go_to_logging_and_into_the_error(caplog: pytest.LogCaptureFixture) -> None:
    found = library()
    log = Log(found)
    severity = found.api.ILogger.Severity
    with caplog.at_level(logging.WARNING, "mdattn_mpi.tensorrt"):
        log.sink.log(severity.WARNING, "a warning")
        log.sink.log(severity.ERROR, "RingAttention unsupported")
        log.sink.log(severity.ERROR, "RingAttention unsupported")
        log.sink.log(severity.VERBOSE, "chatter")
    assert [record.message for record in caplog.records][:2] == [
        "a warning",
        "RingAttention unsupported",
    ]
    assert "chatter" not in caplog.text
    error = log.error("TensorRT built no engine", fix="use -b cuda")
    assert str(error) == ("TensorRT built no engine: RingAttention unsupported. Fix: use -b cuda")
    log.clear()
    assert log.last_words() == "TensorRT gave no reason"


@pytest.mark.parametrize("text", ["9.0", "90", "sm_90", "SM90"])
def test_parse_sm(text: str) -> None:
    assert parse_sm(text) == (9, 0)
    assert parse_sm("12.1") == (12, 1)


@pytest.mark.parametrize("text", ["", "hopper", "9", "1234", "9.x"])
def test_what_is_no_sm(text: str) -> None:
    with pytest.raises(RejectedError, match="no compute capability"):
        parse_sm(text)


def test_nccl_must_be_one(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    line = "7f00-7f01 r-xp 00000000 08:01 42 {}\n"
    one, other = "/venv/nvidia/nccl/lib/libnccl.so.2", "/usr/lib/libnccl.so.2.30"
    maps.write_text("".join(line.format(p) for p in (one, one, "/usr/lib/libm.so.6")))
    assert loaded_nccl(maps) == (one,)
    check_one_nccl(loaded_nccl(maps))
    maps.write_text(line.format(one) + line.format(other))
    with pytest.raises(DeviceError, match="2 NCCL libraries") as caught:
        check_one_nccl(loaded_nccl(maps))
    assert one in caught.value.what
    assert other in caught.value.what
    assert "LD_LIBRARY_PATH" in caught.value.fix
    maps.write_text("")
    with pytest.raises(DeviceError, match="no NCCL library"):
        check_one_nccl(loaded_nccl(maps))
