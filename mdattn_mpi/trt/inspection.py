"""What the inspector says of an engine: does it still hold the collectives of its network?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

ANY = "DIST_COLLECTIVE"  # a layer that says that it is one, and not which
FUSED = re.compile("ForeignNode|Myelin", re.IGNORECASE)  # may hold layers that it doesn't name


def missing_collectives(wanted: Mapping[str, int], information: str) -> dict[str, int]:
    """Count the collectives that an engine should hold, and doesn't.

    Parameters
    ----------
    wanted
        How many of which kind the network had; kinds as TensorRT's ``CollectiveOperation``.
    information
        What ``EngineInspector.get_engine_information`` gives as JSON.

    Returns
    -------
    By kind, what is missing; nothing where the inspector doesn't tell enough to know.

    """
    layers = _layers(information)
    if not layers or any(FUSED.search(layer) for layer in layers):
        return {}
    patterns = {kind: re.compile(kind.replace("_", "_?"), re.IGNORECASE) for kind in wanted}
    found: Counter[str] = Counter()
    for layer in layers:
        kinds = [kind for kind, pattern in patterns.items() if pattern.search(layer)]
        unnamed = re.search("DIST_?COLLECTIVE", layer, re.IGNORECASE)
        found.update(kinds or ([ANY] if unnamed else []))
    missing = {kind: count - found[kind] for kind, count in wanted.items() if count > found[kind]}
    return missing if sum(missing.values()) > found[ANY] else {}


def _layers(information: str) -> list[str]:
    """Name and type of every layer; how much is told of one depends on how it was built."""
    try:
        layers = json.loads(information)["Layers"]
        return [_title(layer) for layer in layers]
    except (ValueError, LookupError, TypeError):
        return []


def _title(layer: Any) -> str:
    if isinstance(layer, str):
        return layer
    return f"{layer.get('Name', '')} {layer.get('LayerType', '')}"
