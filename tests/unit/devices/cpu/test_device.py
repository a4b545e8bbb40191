"""Whose cores are whose; what a device says of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mdattn_mpi.devices.cpu.host import HostDevice, libraries, processor
from mdattn_mpi.lockstep.world import share_of_cores

ALL = "0 1 2 3 4 5 6 7"


@pytest.mark.parametrize(
    ("allowed", "nodes", "shares"),
    [
        ([ALL], "a", [8]),
        ([ALL] * 4, "aaaa", [2] * 4),
        ([ALL] * 3, "aaa", [2] * 3),
        ([ALL] * 16, "a" * 16, [1] * 16),
        (["0 1", "2 3"], "aa", [2, 2]),  # bound by the launcher
        (["0 1", "0 1", "2 3", "2 3"], "aaaa", [1] * 4),  # bound to sockets
        ([ALL, "0 1 2"], "ab", [8, 3]),
        ([ALL, ALL], "ab", [8, 8]),
    ],
)
def test_share_of_the_cores(allowed: list[str], nodes: str, shares: list[int]) -> None:
    assert [share_of_cores(allowed, nodes, rank) for rank in range(len(nodes))] == shares


def test_what_computes_is_named() -> None:
    assert processor()
    assert set(libraries()) == {"numpy", "blas", "exp"}


def test_blas_gets_its_threads_back_when_the_last_device_closes() -> None:
    """In a process of its own: other tests leave devices open."""
    code = """
from threadpoolctl import threadpool_info, threadpool_limits
from mdattn_mpi.devices.cpu.host import HostDevice

def threads():
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}

with threadpool_limits(2, "blas"):
    before = threads()
    one, other = HostDevice(0, 1), HostDevice(0, 1, 2)
    assert threads() == {1}, threads()
    one.close()
    one.close()
    assert threads() == {1}, threads()
    other.close()
    assert threads() == before, threads()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_device_on_the_host_moves_nothing() -> None:
    import numpy as np

    device = HostDevice(0, 1)
    array = np.arange(6, dtype=np.float16).reshape(3, 2, 1)
    assert device.upload(array) is array
    assert device.download(array).wait()[0] is array
    target = device.empty((3, 2, 1), array)
    device.copy(array, target)
    np.testing.assert_array_equal(target, array)
    assert device.empty((0, 2, 1), array).dtype == np.float16
    device.close()
