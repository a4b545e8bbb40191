"""The NCCL communicator over a double of nccl4py: its life, its errors, and the one library."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdattn_mpi.devices import nccl
from mdattn_mpi.devices.nccl import NcclComm, describe_library, loaded_nccl
from mdattn_mpi.errors import DeviceError, MdattnError, RejectedError
from mdattn_mpi.lockstep import Step

MAPS = """\
7f00-7f01 r-xp 00000000 fd:00 1 /opt/a/nvidia/nccl/lib/libnccl.so.2
7f01-7f02 r--p 00000000 fd:00 1 /opt/a/nvidia/nccl/lib/libnccl.so.2
7f02-7f03 r-xp 00000000 fd:00 2 /opt/a/nccl/bindings/nccl.cpython-312-x86_64-linux-gnu.so
7f03-7f04 rw-p 00000000 00:00 0
7f04-7f05 r-xp 00000000 fd:00 3 /usr/lib/libnccl.so.2.21.5
"""


class Result(IntEnum):
    Success, UnhandledCudaError, InProgress = 0, 1, 7


class Double:
    """What nccl4py is: calls return early and settle after some polls."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.calls: list[Any] = []
        self.left = 0
        double = self

        class Communicator:
            ptr = 42

            @classmethod
            def init(cls, size: int, rank: int, unique: Any, config: Any) -> Any:
                double.note("init", size, rank, unique, config)
                return cls()

            def get_async_error(self) -> Result:
                double.left -= 1
                if double.left > 0:
                    return Result.InProgress
                return Result.UnhandledCudaError if double.fails else Result.Success

            def get_last_error(self) -> str:
                return "a broken cable"

            def __getattr__(self, name: str) -> Any:
                return lambda: double.note(name)

        self.Communicator = Communicator
        self.NCCLConfig = lambda **options: options
        self.UniqueId = SimpleNamespace(from_bytes=lambda data: data)
        self.INT8 = 0

    def note(self, *call: Any) -> None:
        self.calls.append(call)
        self.left = 3

    def get_unique_id(self) -> Any:
        return SimpleNamespace(as_bytes=b"unique")

    def get_error_string(self, state: Any) -> str:
        return state.name

    def get_version(self) -> Any:
        return SimpleNamespace(libnccl=SimpleNamespace(version="2.28.9"))


class Group(SimpleNamespace):
    """One rank's view; `others` has the errors that another rank brings, by phase."""

    board = SimpleNamespace(enter=lambda phase: None)
    world_rank = 0
    others: Mapping[str, MdattnError] = {}

    def bcast_bytes(self, data: bytes | None) -> bytes:
        return data or b"unique"

    def agree(self, step: Step, *, error: MdattnError | None = None) -> None:
        if found := error or self.others.get(step.phase):
            raise found


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    made = Double()
    monkeypatch.setattr(nccl, "_load", lambda: made)
    monkeypatch.setattr(NcclComm, "_result", Result)
    monkeypatch.setattr(nccl, "_PAUSE", 0.0)
    return made


def test_made_without_blocking_and_destroyed_in_order(double: Double) -> None:
    comm = NcclComm(Group(rank=1, size=3))  # type: ignore[arg-type]
    assert comm.ptr == 42
    comm.check()
    comm.close()
    assert double.calls[0] == ("init", 3, 1, b"unique", {"blocking": False})
    assert [name for name, *_ in double.calls] == ["init", "finalize", "destroy"]


def test_a_failure_aborts_and_says_what_nccl_says(double: Double) -> None:
    double.fails = True
    with pytest.raises(DeviceError, match=r"init: UnhandledCudaError; a broken cable.*NCCL_DEBUG"):
        NcclComm(Group(rank=0, size=2))  # type: ignore[arg-type]
    assert double.calls[-1] == ("abort",)


@pytest.mark.parametrize("phase", ["nccl4py", "NCCL"])
def test_nobody_waits_for_a_rank_that_failed_before(double: Double, phase: str) -> None:
    failed = {phase: DeviceError("out of order", rank=2)}
    with pytest.raises(DeviceError, match=r"rank 2.*out of order"):
        NcclComm(Group(rank=1, size=3, others=failed))  # type: ignore[arg-type]
    assert double.calls == []


def test_no_wait_is_without_end(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "PATIENCE", -1.0)
    with pytest.raises(DeviceError, match="init took longer"):
        NcclComm(Group(rank=0, size=2))  # type: ignore[arg-type]
    assert double.calls[-1] == ("abort",)


def test_libraries_are_found_in_the_maps(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    found = ("/opt/a/nvidia/nccl/lib/libnccl.so.2", "/usr/lib/libnccl.so.2.21.5")
    assert loaded_nccl(maps) == found
    maps.write_text("")
    assert loaded_nccl(maps) == ()


def test_a_second_library_is_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "loaded_nccl", lambda: ("/a/libnccl.so", "/b/libnccl.so"))
    with pytest.raises(DeviceError, match=r"/a/libnccl\.so and /b/libnccl\.so"):
        describe_library(Double())
    monkeypatch.setattr(nccl, "loaded_nccl", lambda: ("/a/libnccl.so",))
    assert describe_library(Double()) == "2.28.9 (/a/libnccl.so)"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nccl.core", None)
    with pytest.raises(RejectedError, match=r"nccl4py.*\[cuda\]"):
        NcclComm(Group(rank=0, size=1))  # type: ignore[arg-type]
