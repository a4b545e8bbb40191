"""Whether this process could use CUDA at all, found out without importing any of it."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

from mdattn_mpi.text import install

EXTRA = install("cuda")
MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
PACKAGES = {"cuda.core": "cuda-core", "nccl.core": "nccl4py", "cudnn": "nvidia-cudnn-frontend"}


def why_no_cuda() -> str:
    """Say why `cuda` can't be used here; empty when it can."""
    count = gpu_count()
    if count < 1:
        return "no NVIDIA GPU is visible" if count == 0 else "there is no NVIDIA driver"
    missing = [package for module, package in PACKAGES.items() if not _importable(module)]
    return f"not installed: {', '.join(missing)} ({EXTRA})" if missing else ""


def libcuda() -> ctypes.CDLL | None:
    """Open the driver's own library; None without a driver."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def gpu_count() -> int:
    """Count the visible GPUs; −1 without a driver."""
    driver = libcuda()
    if driver is None:
        return -1
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def gpu_memory() -> int:
    """Bytes of the smallest visible GPU; 0 without one."""
    driver = libcuda()
    if driver is None or gpu_count() < 1:
        return 0
    sizes = []
    for ordinal in range(gpu_count()):
        device, size = ctypes.c_int(0), ctypes.c_size_t(0)
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        sizes.append(size.value)
    return min(sizes)


def gpu_attribute(ordinal: int, which: int) -> int:
    """Ask the driver for one of ``CU_DEVICE_ATTRIBUTE_…`` of a visible GPU; 0 if it can't tell."""
    driver, device, value = libcuda(), ctypes.c_int(0), ctypes.c_int(0)
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return 0
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return value.value


def gpu_name(ordinal: int) -> str:
    """Name of a visible GPU; empty without one."""
    driver, device, name = libcuda(), ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), ordinal):
        return ""
    driver.cuDeviceGetName(name, len(name), device)
    return name.value.decode(errors="replace")


def gpu_sm(ordinal: int) -> tuple[int, int]:
    """Compute capability of a visible GPU."""
    return gpu_attribute(ordinal, 75), gpu_attribute(ordinal, 76)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
