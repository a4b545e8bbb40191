"""A model's folder: its config and its weights in safetensors, looked at before they are loaded.

Nothing in it is run: no code of its own, no pickle. The formats are those of Transformers'
``save_pretrained`` and of safetensors (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from mdattn_mpi.errors import RejectedError

CONFIG = "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON = 100 << 20  # bytes of a config, an index, a header: safetensors' own limit
SAMPLE_BYTES = 4096
SAMPLES = 3  # blocks of every tensor that go into the digest
LENGTH_BYTES = 8  # of a safetensors header's length


@dataclass(frozen=True)
class Weight:
    """One tensor of a safetensors file, and where its bytes lie in it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Its numbers."""
        return prod(self.shape)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that can be loaded: what its config says, and its weights.

    ``config`` is config.json as it stands there; nested text configs aren't taken apart.
    """

    path: Path
    config: Mapping[str, Any]
    weights: tuple[Weight, ...]

    @property
    def kind(self) -> str:
        """The architecture's name in Transformers, such as ``llama``."""
        return str(self.config["model_type"])

    @property
    def parameters(self) -> int:
        """How many numbers the weights have."""
        return sum(weight.count for weight in self.weights)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over config and the weights' names, shapes, dtypes and samples of their bytes.

        A few blocks of each tensor are read: another training run changes all of them.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for weight in self.weights:
            digest.update(json.dumps([weight.name, weight.shape, weight.dtype]).encode())
            for block in _samples(weight):
                digest.update(block)
        return digest.hexdigest()


def open_folder(path: str | os.PathLike[str]) -> ModelFolder:
    """Look at a local folder with ``config.json`` and safetensors.

    Raises
    ------
    RejectedError
        No such folder, no config, code of its own, weights that are pickled, damaged or absent.

    """
    folder = Path(path)
    if not folder.is_dir():
        what = "isn't a folder" if folder.exists() else "doesn't exist"
        fix = "name a local folder with config.json in it"
        if not folder.exists() and str(path).count("/") == 1 and not folder.is_absolute():
            fix += f"; nothing is downloaded: hf download {path} --local-dir FOLDER"
        raise _reject(folder, what, fix)
    config = _config(folder)
    files = _weight_files(folder)
    weights = sorted((w for file in files for w in _header(file)), key=lambda w: w.name)
    return ModelFolder(folder, config, tuple(weights))


def _reject(path: Path, what: str, fix: str) -> RejectedError:
    return RejectedError(what, fix=fix, file=str(path))


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise _reject(folder, f"has no {CONFIG}", "save the model with save_pretrained(FOLDER)")
    config = _json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise _reject(
            path,
            "doesn't say which model it is of (model_type)",
            "save the model with save_pretrained(FOLDER)",
        )
    if config.get("auto_map"):
        raise _reject(
            path,
            f"wants code of its own to be run (auto_map: {', '.join(config['auto_map'])}), which "
            "is never done",
            f"take auto_map out, if Transformers' own {config['model_type']} is what is meant",
        )
    return config


def _weight_files(folder: Path) -> Sequence[Path]:
    """Find the safetensors files: those of the index, else the one there is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        table = _json(index)
        names = table.get("weight_map", {}) if isinstance(table, dict) else {}
        found = sorted({str(name) for name in names.values()})
        outside = next((name for name in found if Path(name).name != name), None)
        if outside or not found:
            raise _reject(index, f"is no index of files beside it ({outside})", "save it anew")
        missing = next((name for name in found if not (folder / name).is_file()), None)
        if missing:
            raise _reject(index, f"names {missing}, which isn't there", "copy that file too")
        return [folder / name for name in found]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise _reject(
            folder,
            f"has no safetensors, only pickled weights ({', '.join(pickled[:3])}), which can run "
            "code and are never opened",
            "where you trust them: from_pretrained(FOLDER).save_pretrained(OTHER)",
        )
    raise _reject(folder, "has no model.safetensors", "save the model with save_pretrained(FOLDER)")


def _json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size} bytes are too many")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise _reject(path, f"can't be read: {error}", "copy the folder again") from error
    except (ValueError, RecursionError) as error:
        raise _reject(path, f"isn't valid JSON: {error}", "copy the file again") from error


def _header(path: Path) -> list[Weight]:
    """Read the header of a safetensors file, and make sure that the file holds what it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if length > min(size - LENGTH_BYTES, MAX_JSON):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
        return [
            _weight(name, about, path, LENGTH_BYTES + length, size)
            for name, about in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _reject(
            path, f"is damaged, or no safetensors file: {error}", "copy it again"
        ) from error


def _weight(name: str, about: Mapping[str, Any], path: Path, base: int, size: int) -> Weight:
    start, stop = about["data_offsets"]
    if not 0 <= start <= stop <= size - base:
        raise ValueError(f"{name} at bytes {start} to {stop} of {size - base}")
    shape = tuple(int(n) for n in about["shape"])
    return Weight(name, shape, str(about["dtype"]), path, base + start, base + stop)


def _samples(weight: Weight) -> list[bytes]:
    """Read blocks at the start, the middle and the end."""
    last = max(weight.start, weight.stop - SAMPLE_BYTES)
    places = {weight.start + (last - weight.start) * n // (SAMPLES - 1) for n in range(SAMPLES)}
    with weight.file.open("rb") as file:
        found = []
        for place in sorted(places):
            file.seek(place)
            found.append(file.read(min(SAMPLE_BYTES, weight.stop - place)))
    return found
