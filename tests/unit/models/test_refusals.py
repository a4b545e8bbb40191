"""What a model can't do is refused by name, with what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.models.attention import NAME, register
from mdattn_mpi.models.network import Network
from mdattn_mpi.models.outputs import check_give
from mdattn_mpi.runner.jobspec import JobSpec
from mdattn_mpi.runner.transformer import check_options
from tests.support.model_ranks import network
from tests.support.tiny_models import MAX_POSITIONS, tiny_model

transformers = pytest.importorskip("transformers", reason="needs the extra transformers")

SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1}


def model_of(config: Any) -> Any:
    register()
    return transformers.AutoModel.from_config(config, attn_implementation=NAME)


def test_a_model_that_numbers_tokens_by_itself() -> None:
    with pytest.raises(RejectedError, match="MambaModel takes no position_ids"):
        Network(transformers.MambaModel(transformers.MambaConfig(**SMALL)))


def test_an_encoder_and_a_decoder() -> None:
    config = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(RejectedError, match="has an encoder and a decoder"):
        Network(transformers.T5Model(config))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_longer_sequences_before(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # type: ignore[dict-item]
        rope["original_max_position_embeddings"] = 64
    config = transformers.LlamaConfig(
        **SMALL, num_attention_heads=4, intermediate_size=32, rope_parameters=rope
    )
    with pytest.raises(RejectedError, match=f"{kind} rotary positions"):
        Network(model_of(config))


def test_longer_than_its_positions() -> None:
    rotary = network(tiny_model("llama"))
    rotary.check_length(512, beyond=False)
    rotary.check_length(513, beyond=True)
    with pytest.raises(RejectedError, match=r"513 tokens; .* for 512") as refused:
        rotary.check_length(513, beyond=False)
    assert "--beyond-positions" in refused.value.fix


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_longer_than_a_table_of_positions(family: str) -> None:
    learned = network(tiny_model(family))
    learned.check_length(MAX_POSITIONS, beyond=False)
    for beyond in (True, False):
        with pytest.raises(RejectedError, match=f"has positions for {MAX_POSITIONS}"):
            learned.check_length(MAX_POSITIONS + 1, beyond)


@pytest.mark.parametrize(("bad", "at"), [(96, 3), (-1, 0), (1 << 40, 4)])
def test_ids_beyond_the_vocabulary(bad: int, at: int) -> None:
    ids = np.full(5, 9)
    ids[at] = bad
    fault = network(tiny_model("llama")).fault_of(ids)
    assert fault
    assert f"input_ids[{at}] is {bad}: the model's vocabulary has ids from 0 to 95" in fault[0]
    assert network(tiny_model("llama")).fault_of(np.array([0, 95])) is None


def test_masks_that_esm_counts_over_the_whole_sequence() -> None:
    esm = network(tiny_model("esm"))
    assert esm.fault_of(np.array([5, 7])) is None
    fault = esm.fault_of(np.array([5, 3]))
    assert fault
    assert "input_ids[1] is 3: the mask" in fault[0]


@pytest.mark.parametrize("give", ["", "states", "embedding,states"])
def test_outputs_that_are_not_known(give: str) -> None:
    with pytest.raises(RejectedError, match="there is no"):
        check_give(give, causal=True)


def test_log_probabilities_where_later_tokens_are_seen() -> None:
    assert check_give("logprobs,embedding", causal=True) == ("logprobs", "embedding")
    with pytest.raises(RejectedError, match="see those after them"):
        check_give("logprobs", causal=False)


@pytest.mark.parametrize(
    "option",
    [{"lse": True}, {"backend": "tensorrt"}, {"layout": "head_major"}, {"engine": "x"}],
)
def test_options_of_other_kinds_of_work(option: dict[str, Any], tmp_path: Path) -> None:
    spec = JobSpec(str(tmp_path / "a"), str(tmp_path / "b"), model="folder", **option)
    with pytest.raises(RejectedError, match="with --model"):
        check_options(spec)
    check_options(JobSpec(str(tmp_path / "a"), str(tmp_path / "b"), model="folder"))
