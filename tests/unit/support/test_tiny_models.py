"""The tiny models are no easy ones: wrong attention shows in every layer of each of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra transformers")
torch = pytest.importorskip("torch", reason="needs the extra transformers")

from tests.support.tiny_models import (  # noqa: E402
    FAMILIES,
    WINDOWED,
    hidden_state,
    locality,
    random_ids,
    tiny_model,
)


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.float() - right).norm() / right.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_within_each_rank_only_differs_in_every_layer(family: str) -> None:
    changed = locality(family, tokens=31, ranks=2)
    assert len(changed) == 3
    assert min(changed) > 0.1, changed


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_gives_the_same_again_and_bf16_is_near_it(family: str) -> None:
    ids = random_ids(31)
    right = hidden_state(tiny_model(family), ids)
    assert torch.equal(hidden_state(tiny_model(family), ids), right)
    assert 1e-4 < relative(hidden_state(tiny_model(family), ids, "bfloat16"), right) < 0.05
    assert relative(hidden_state(tiny_model(family, seed=1), ids), right) > 0.5


@pytest.mark.parametrize("family", WINDOWED)
def test_without_its_window_a_model_gives_something_else(family: str, tmp_path: Path) -> None:
    ids, folder = random_ids(31), tiny_model(family)
    config = json.loads((folder / "config.json").read_text())
    name = "local_attention" if family == "modernbert" else "sliding_window"
    assert config[name] < 31 // 2
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, name: 1000}))
    assert relative(hidden_state(tmp_path, ids), hidden_state(folder, ids)) > 0.1
