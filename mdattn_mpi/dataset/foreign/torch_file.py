"""Tensors that PyTorch has saved, read by PyTorch's own reader for weights; where it is installed.

A .pt file is a pickle, and a pickle is a program. PyTorch's reader with ``weights_only`` runs none:
it knows tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import numpy as np

from mdattn_mpi.dataset.dtypes import NUMPY
from mdattn_mpi.dataset.foreign.tensor import ForeignFile, of_array, stem_of
from mdattn_mpi.errors import RejectedError

SAFE = (2, 6)  # before, weights_only could be made to run code: CVE-2025-32434
_SAVE = "save its tensors as .safetensors where PyTorch is, or install PyTorch 2.6 or later here"


def read(path: str, *, mapped: bool) -> ForeignFile:
    """List tensors by the keys that lead to them, joined with dots: ``layers.0.q``.

    Files since PyTorch 1.6 can be mapped rather than read into memory.

    Raises
    ------
    RejectedError
        PyTorch isn't here or too old, or the file holds more than tensors and plain values.

    """
    try:
        torch: Any = import_module("torch")
    except ImportError:
        raise RejectedError(
            "is a pickle (a .pt file?), which PyTorch alone can read, and that isn't installed",
            fix=_SAVE,
            file=path,
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE:
        raise RejectedError(
            f"is a .pt file, and PyTorch {torch.__version__} may run code that is in it",
            fix=_SAVE,
            file=path,
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else type(error).__name__
        raise RejectedError(
            f"isn't a .pt file of tensors alone: PyTorch refuses it ({reason})",
            fix="if you trust it, load it in PyTorch and save a dict of tensors",
            file=path,
        ) from None
    found = ForeignFile()
    seen = {id(content)}
    pending = [("", content)]
    while pending:
        name, value = pending.pop()
        inside = _inside(value)
        if not inside:
            _add(torch, name or stem_of(path), value, found)
        for key, child in inside:
            place = f"{name}.{key}" if name else str(key)
            if _inside(child) and id(child) in seen:  # met before, or a circle
                found.others[place] = None
                continue
            seen.add(id(child))
            pending.append((place, child))
    return found


def _inside(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by key or position; nothing in anything else."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _add(torch: Any, name: str, value: Any, found: ForeignFile) -> None:
    array = _array(torch, value) if isinstance(value, torch.Tensor) else None
    if array is not None:
        found.put(name, of_array(array), array.reshape(()).item() if array.size == 1 else None)
    else:
        found.others[name] = value if isinstance(value, bool | int | float | str) else None


def _array(torch: Any, tensor: Any) -> np.ndarray[Any, Any] | None:
    """Share a tensor's memory; None of a kind that NumPy doesn't have."""
    tensor = tensor.detach()
    try:
        if tensor.dtype == torch.bfloat16:
            bits: np.ndarray[Any, Any] = tensor.view(torch.int16).numpy()
            return bits.view(NUMPY["bfloat16"])
        array: np.ndarray[Any, Any] = tensor.resolve_conj().resolve_neg().numpy()
        return array
    except (TypeError, RuntimeError):
        return None
