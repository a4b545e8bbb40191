"""What a sharded model gives for known inputs, for whoever runs it elsewhere.

ONNX Runtime has it in float32, with the model's own weights. It travels with an engine that is
built of the model, so that the machine that runs the engine can hold it against this, with neither
ONNX Runtime nor the model there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.onnx.cast import widen
from mdattn_mpi.onnx.model import copied
from mdattn_mpi.onnx.ranks import random_inputs, run_ranks
from mdattn_mpi.onnx.segments import Arrays, load_weights
from mdattn_mpi.onnx.sharding import Sharding

KINDS = ("inputs", "outputs", "alone")


@dataclass(frozen=True)
class KnownRun:
    """A run over `tokens` tokens, as arrays of the whole sequence by name.

    Attributes
    ----------
    inputs
        What goes in; floats in float32, but of values that the model's own dtype has.
    outputs
        What must come out, in float32.
    alone
        What would come out if every rank knew its own tokens only.

    """

    tokens: int
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    alone: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Encode as an ``.npz`` file."""
        file = BytesIO()
        arrays = {
            f"{kind}/{name}": array for kind in KINDS for name, array in getattr(self, kind).items()
        }
        np.savez_compressed(file, tokens=np.int64(self.tokens), **arrays)
        return file.getvalue()

    @staticmethod
    def from_bytes(data: bytes, path: Path) -> KnownRun:
        """Decode; `path` is for the message."""
        try:
            with np.load(BytesIO(data), allow_pickle=False) as file:
                found = {
                    kind: {
                        name.removeprefix(f"{kind}/"): file[name]
                        for name in file.files
                        if name.startswith(f"{kind}/")
                    }
                    for kind in KINDS
                }
                return KnownRun(int(file["tokens"]), **found)
        except Exception as error:  # zipfile's own, or NumPy's
            raise RejectedError(
                f"not what a model gives for known inputs ({error})",
                file=str(path),
                fix="build the engine again",
            ) from error


def known_run(model: Any, path: Path, sharding: Sharding, tokens: int, seed: int = 0) -> KnownRun:
    """Run a sharded model on all its ranks, in one process.

    `path` tells where its weights lie. The model is left as it is.

    Raises
    ------
    RejectedError
        ONNX Runtime is missing, or can't run it.

    """
    drawn = random_inputs(model, sharding, tokens, seed)
    inputs = {name: _wide(array) for name, array in drawn.items()}
    wide = load_weights(copied(model), path)
    widen(wide)
    found = run_ranks(wide, sharding, inputs, tokens)
    outputs, alone = (_joined(each, sharding, tokens) for each in found)
    own = {name: array for name, array in inputs.items() if sharding.given_by_rank(name) is None}
    return KnownRun(tokens, own, outputs, alone)


def _wide(array: Any) -> Any:
    whole = array.dtype.kind in "iub"
    return array if whole else array.astype(np.float32)


def _joined(ranks: list[Arrays], sharding: Sharding, tokens: int) -> Arrays:
    """Put the ranks' rows together, without those that fill up the last shards."""
    return {
        name: np.take(np.concatenate([each[name] for each in ranks], axis), range(tokens), axis)
        for name in ranks[0]
        if (axis := sharding.axes.get(name)) is not None
    }
