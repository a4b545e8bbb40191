"""A model's folder is looked at before anything of it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.models.folder import open_folder
from tests.support.tiny_models import tiny_model

pytest.importorskip("transformers", reason="needs the extra transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_good_folder_is_described(folder: Path) -> None:
    found = open_folder(folder)
    assert found.kind == "llama"
    names = {weight.name: weight.shape for weight in found.weights}
    assert names["model.embed_tokens.weight"] == (96, 64)
    assert found.parameters == sum(weight.count for weight in found.weights) > 100_000


def test_the_digest_changes_with_config_and_content(folder: Path) -> None:
    digests = {open_folder(folder).digest}
    assert open_folder(folder).digest in digests
    change_config(folder, rope_theta=1.0)
    digests.add(open_folder(folder).digest)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    digests.add(open_folder(folder).digest)
    assert len(digests) == 3


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_type(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def own_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModel": "modeling.Own"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def long_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def outside(folder: Path) -> None:
    index = {"weight_map": {"a": "../../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_missing(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (gone, "doesn't exist"),
        (no_config, "has no config.json"),
        (not_json, "isn't valid JSON"),
        (no_type, "doesn't say which model it is of"),
        (own_code, "code of its own.*auto_map: AutoModel"),
        (pickled, "only pickled weights .pytorch_model.bin"),
        (no_weights, "has no model.safetensors"),
        (cut, "is damaged"),
        (long_header, "its header claims"),
        (outside, "is no index of files beside it"),
        (shard_missing, "names model-00002.safetensors, which isn't there"),
    ],
)
def test_a_bad_folder_is_refused(folder: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(folder)
    with pytest.raises(RejectedError, match=said) as refused:
        open_folder(folder)
    assert refused.value.fix
    assert str(folder) in str(refused.value)


def test_an_unknown_architecture_is_refused(folder: Path) -> None:
    from mdattn_mpi.models.load import load

    change_config(folder, model_type="brandnew", architectures=["BrandNewModel"])
    said = r"Transformers \d+\.\S+, which is installed here, has no architecture 'brandnew'"
    with pytest.raises(RejectedError, match=said) as refused:
        load(open_folder(folder), "bfloat16", "cpu")
    assert "pip install -U transformers" in refused.value.fix
    assert len(str(refused.value)) < 400  # a sentence of ours, not the paragraph of Transformers


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": [1.5, 2]}, "'sliding_window'.*[1.5, 2]"),
        ({"num_attention_heads": 3}, r"q_proj.weight is \[64, 64\], where the config wants"),
        ({"num_attention_heads": "many"}, "'num_attention_heads' expected int"),
        ({"hidden_act": "wobble"}, "it has no 'wobble'"),
        ({"dtype": "float99"}, "float99"),
        ({"rope_scaling": {"rope_type": "odd", "factor": 2.0}}, "it has no 'odd'"),
        (
            {"hidden_size": 128},
            r"is \[\d+, 64\], where the config wants \[\d+, 128\].*, and \d+ more",
        ),
    ],
)
def test_a_config_that_makes_no_model_is_said_to_be_wrong(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    from mdattn_mpi.models.load import load

    shutil.rmtree(folder)
    shutil.copytree(tiny_model("mistral"), folder)
    change_config(folder, **changes)
    with pytest.raises(RejectedError, match=said) as refused:
        load(open_folder(folder), "bfloat16", "cpu")
    assert str(folder) in str(refused.value)
    assert "config" in refused.value.fix
    assert "\n" not in refused.value.what


def test_a_name_on_the_hub_is_not_downloaded() -> None:
    with pytest.raises(RejectedError, match="doesn't exist") as refused:
        open_folder("some-org/some-model")
    assert "hf download some-org/some-model" in refused.value.fix
    with pytest.raises(RejectedError, match="isn't a folder"):
        open_folder(__file__)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    from mdattn_mpi.models.load import load

    change_config(folder, num_hidden_layers=4)
    with pytest.raises(RejectedError, match=r"has no weights for .*layers.3"):
        load(open_folder(folder), "bfloat16", "cpu")
    change_config(folder, num_hidden_layers=3, hidden_size=32)
    with pytest.raises(RejectedError, match=r"is \[.*64\], where the config wants \[.*32\]"):
        load(open_folder(folder), "bfloat16", "cpu")


def test_a_head_that_is_not_there_is_not_made_up() -> None:
    from mdattn_mpi.models.load import load

    with pytest.raises(RejectedError, match=r"has no weights for cls.predictions"):
        load(open_folder(tiny_model("bert")), "bfloat16", "cpu", head=True)
    with pytest.raises(RejectedError, match="has no language model of architecture 'esm'"):
        load(open_folder(tiny_model("esm")), "bfloat16", "cpu", head=True)
