"""The proof of a model's engine: known inputs, and beside it what ONNX Runtime gives for them.

What comes with the engine (`onnx.known`) was computed in float32 with the model's own weights. The
engine's error is the root of the mean square over a rank's own tokens, in units of what is right;
so a model's rounding and a model's mistakes are far apart. The control is what a rank would give
from its own tokens alone: where that is too near to what is right, nothing is proven.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdattn_mpi.errors import DeviceError
from mdattn_mpi.onnx.known import KnownRun
from mdattn_mpi.partition import equal_shards
from mdattn_mpi.trt.proof import no_answer
from mdattn_mpi.trt.store import Manifest

TOLERANCE = 5e-2  # what 16 bits may make of a deep model
CONTROL = 10  # how many times the error the control must be
FAINT = 2e-2  # a control below this can't be told from rounding


@dataclass(frozen=True)
class ModelVerdict:
    """What one rank found: its error, that of its own tokens alone, and what came out if wrong."""

    error: float
    control: float
    seen: str = ""


def judge_model(
    known: KnownRun, manifest: Manifest, rank: int, found: Mapping[str, Any]
) -> ModelVerdict:
    """Hold a rank's outputs, by name, against its part of a known run."""
    span = equal_shards(known.tokens, manifest.ranks)[rank]

    def own(arrays: Mapping[str, Any], name: str) -> Any:
        return np.take(arrays[name], range(span.start, span.stop), manifest.axes[name])

    verdicts = []
    for name in known.outputs:
        truth, alone = own(known.outputs, name), own(known.alone, name)
        array = np.asarray(found[name], np.float64).reshape(truth.shape)
        error, control = _distance(truth, array), _distance(truth, alone)
        wrong = not error <= TOLERANCE or (control >= FAINT and error * CONTROL > control)
        verdicts.append(ModelVerdict(error, control, _name(array, alone) if wrong else ""))
    wrong_first = [each for each in verdicts if each.seen] or verdicts
    return max(wrong_first, key=lambda each: each.error)


def _distance(truth: Any, found: Any) -> float:
    """Root of the mean square of the difference, in units of that of the truth."""
    difference = np.asarray(found, np.float64) - truth
    size = float(np.sqrt(np.mean(np.square(truth, dtype=np.float64)))) if truth.size else 0.0
    error = float(np.sqrt(np.mean(np.square(difference)))) if truth.size else 0.0
    return error / max(size, 1e-30) if np.isfinite(error) else np.inf


def _name(found: Any, alone: Any) -> str:
    """Say in words what came out instead of the right thing."""
    if plain := no_answer(found):
        return plain
    if _distance(alone, found) <= TOLERANCE:
        return "what its own tokens alone would make"
    return "other numbers"


def conclude_model(manifest: Manifest, verdicts: Sequence[ModelVerdict]) -> str:
    """Refuse an engine that is wrong on any rank; else say what is proven, in words.

    Raises
    ------
    DeviceError
        With the library, its version, and what came out on the first rank that is wrong.

    """
    wrong = [(rank, one) for rank, one in enumerate(verdicts) if one.seen]
    if wrong:
        rank, one = wrong[0]
        raise DeviceError(
            f"{manifest.flavour} {manifest.version} computes the model wrongly "
            f"({manifest.strategy} on {manifest.ranks} ranks): {len(wrong)} of {len(verdicts)} "
            f"ranks; rank {rank} gives {one.seen}, {one.error:.2g} off where ONNX Runtime's "
            "numbers are 1",
            rank=rank,
            fix="use TensorRT 11.2 or later, another strategy (mdattn shard -s), or --model on "
            "CPUs",
        )
    error = max(one.error for one in verdicts)
    control = max(one.control for one in verdicts)
    if manifest.ranks > 1 and control < FAINT:
        return (
            f"as ONNX Runtime has it (error {error:.1e}), but so would each rank's own tokens "
            "alone be: ranks weren't seen to hear of each other"
        )
    return f"proven against ONNX Runtime (error {error:.1e}; own tokens alone {control:.1e})"
