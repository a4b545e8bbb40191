"""How a model is shared by ranks, and the note of it that travels in the file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mdattn_mpi.errors import RejectedError

# Inputs of one number: how many of the collected keys count. All of the sequence's; or, where a
# mask is aligned with the last row of a rank's buffer, those up to there. In a model that collects
# the keys of several sequences the sequence's name follows: ``keys_T``.
KEYS, CAUSAL_KEYS = "keys", "causal_keys"
# Inputs ``[tokens]``, int64: where in its sequence each token of the rank's shard stands.
POSITIONS = "token_positions"
NOTE = "mdattn"


@dataclass(frozen=True)
class Sharding:
    """How a network is shared by ranks."""

    strategy: str
    ranks: int
    axes: dict[str, int]  # the dim that counts tokens, of each input and output that has one
    paddings: dict[str, int] = field(default_factory=dict)  # the id that an input must not hold

    def given_by_rank(self, tensor: str) -> str | None:
        """Tell which of `KEYS`, `CAUSAL_KEYS`, `POSITIONS` an input is; None: the model's own."""
        if tensor in self.axes:
            return None
        for kind in (KEYS, CAUSAL_KEYS, POSITIONS):
            if tensor == kind or tensor.startswith(f"{kind}_"):
                return kind
        return None


def write_sharding(model: Any, sharding: Sharding) -> None:
    """Note in the file how it is sharded."""
    entry = model.metadata_props.add()
    entry.key = NOTE
    fields = asdict(sharding)
    if not sharding.paddings:
        del fields["paddings"]
    entry.value = json.dumps(fields)


def read_sharding(model: Any, path: Path) -> Sharding:
    """Read what `write_sharding` noted; refuse a model without it."""
    notes = [entry.value for entry in model.metadata_props if entry.key == NOTE]
    try:
        fields = json.loads(notes[-1])
        axes, paddings = (
            {str(name): int(number) for name, number in numbers.items()}
            for numbers in (fields["axes"], fields.get("paddings", {}))
        )
        return Sharding(str(fields["strategy"]), int(fields["ranks"]), axes, paddings)
    except (IndexError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RejectedError(
            "nothing in this model tells how it is sharded",
            file=str(path),
            fix="shard it first: mdattn shard MODEL.onnx -n P -s STRATEGY -o OUT.onnx",
        ) from error
