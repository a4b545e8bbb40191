"""The GPUs that this process sees, asked of the driver's own library; nothing else is loaded."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from mdattn_mpi.devices.presence import gpu_attribute, gpu_count, gpu_sm, libcuda

_ECC = 32  # CU_DEVICE_ATTRIBUTE_ECC_ENABLED
_ACCESS, _NATIVE_ATOMICS = 2, 3  # of peers; native atomics go over NVLink only


def gpu_facts() -> dict[str, Any]:
    """Driver and GPUs. ``count`` is -1 without a driver, 0 when it shows none."""
    driver, count = libcuda(), gpu_count()
    facts: dict[str, Any] = {
        "count": count,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "nodes": len([name for name in os.listdir("/dev") if _is_gpu(name)]),
    }
    if driver is None or count < 1:
        return facts
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    facts["driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    facts["devices"] = [_device(driver, ordinal) for ordinal in range(count)]
    facts["peers"] = [[_peer(driver, one, other) for other in range(count)] for one in range(count)]
    return facts


def _is_gpu(name: str) -> bool:
    return name.startswith("nvidia") and name[6:].isdecimal()


def _device(driver: Any, ordinal: int) -> dict[str, Any]:
    handle = _handle(driver, ordinal)
    uuid, name = (ctypes.c_ubyte * 16)(), ctypes.create_string_buffer(100)
    memory = ctypes.c_size_t(0)
    driver.cuDeviceGetUuid(uuid, handle)
    driver.cuDeviceGetName(name, 100, handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    return {
        "uuid": bytes(uuid).hex(),
        "name": name.value.decode(errors="replace"),
        "memory": memory.value,
        "sm": list(gpu_sm(ordinal)),
        "ecc": bool(gpu_attribute(ordinal, _ECC)),
    }


def _handle(driver: Any, ordinal: int) -> Any:
    handle = ctypes.c_int(0)
    driver.cuDeviceGet(ctypes.byref(handle), ordinal)
    return handle


def _peer(driver: Any, one: int, other: int) -> str:
    """How GPU `one` reaches `other`: itself, nvlink, pcie, or not at all."""
    if one == other:
        return "itself"
    found = []
    for which in (_ACCESS, _NATIVE_ATOMICS):
        value = ctypes.c_int(0)
        driver.cuDeviceGetP2PAttribute(
            ctypes.byref(value), which, _handle(driver, one), _handle(driver, other)
        )
        found.append(value.value)
    return "nvlink" if all(found) else "pcie" if found[0] else "no"
