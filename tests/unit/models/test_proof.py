"""The proof before the job refuses what would give another answer, and says what it can't see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.tiny_models import WINDOWED, tiny_model

pytest.importorskip("transformers", reason="needs the extra transformers")

import torch

from mdattn_mpi.errors import RejectedError
from mdattn_mpi.models.attention import Layer
from mdattn_mpi.models.network import Network
from mdattn_mpi.models.proof import Proof, probe_ids, probe_length, prove
from tests.support.model_ranks import on_ranks


def proof_of(family: str, change: Callable[[Network], Any], ranks: int = 2) -> Proof:
    def body(network: Network, device: Any, group: Any) -> Proof:
        change(network)
        return prove(network, device, "cpu", group, "ring")

    proofs = on_ranks(ranks, tiny_model(family), body)
    assert len({repr(proof) for proof in proofs}) == 1  # all ranks judge alike
    return proofs[0]


def layers(network: Network) -> Any:
    return network.backbone.layers


def mix_tokens(network: Network) -> None:
    """Let the second layer's MLP see the token before."""
    mlp = layers(network)[1].mlp
    inside = mlp.forward

    def shifted(hidden: torch.Tensor) -> torch.Tensor:
        return inside(hidden + 0.5 * hidden.roll(1, dims=1))

    mlp.forward = shifted


def test_what_mixes_tokens_beside_the_attention_is_refused_by_layer() -> None:
    proof = proof_of("llama", mix_tokens)
    with pytest.raises(RejectedError, match="the model at the attention of layer 2") as refused:
        proof.check()
    assert refused.value.exit_code == 2


def count_from_zero(network: Network) -> None:
    """Number each rank's tokens from 0 on, as if they were all there is."""
    inner = network.backbone.forward

    def forward(input_ids: Any = None, position_ids: Any = None, **rest: Any) -> Any:
        return inner(input_ids=input_ids, **rest)

    network.backbone.forward = forward


@pytest.mark.parametrize("family", ["llama", "bert", "roberta", "gpt2", "esm"])
def test_wrong_positions_are_refused(family: str) -> None:
    proof = proof_of(family, count_from_zero)
    with pytest.raises(RejectedError, match="they part by"):
        proof.check()


def see_everything(network: Network) -> None:
    """Ours is told another mask than the model's own."""
    for layer in layers(network):
        layer.self_attn.is_causal = False


def test_another_mask_is_refused_at_the_first_attention() -> None:
    with pytest.raises(RejectedError, match="at the attention of layer 0"):
        proof_of("llama", see_everything, ranks=1).check()


@pytest.mark.parametrize(
    ("family", "option", "empty"),
    [*((family, "window", None) for family in WINDOWED), ("gemma2", "softcap", None)],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_option_that_is_left_out_is_refused(
    family: str, option: str, empty: Any, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = Layer.over
    without = lambda layer, *rest: over(layer._replace(**{option: empty}), *rest)  # noqa: E731
    monkeypatch.setattr(Layer, "over", without)
    with pytest.raises(RejectedError, match=r"at the attention of layer [01]"):
        proof_of(family, lambda network: None, ranks).check()


def attend_to_nothing(network: Network) -> None:
    """Keys of 0 let every token see the mean of all values, which are alike: nothing is told."""
    for layer in layers(network):
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.zero_()
        layer.self_attn.v_proj.bias = torch.nn.Parameter(
            torch.ones(layer.self_attn.v_proj.weight.shape[0], dtype=torch.bfloat16)
        )


def test_where_a_wrong_answer_would_look_right_it_is_inconclusive() -> None:
    proof = proof_of("llama", attend_to_nothing)
    proof.check()
    assert all(place.inconclusive for place in proof.places)
    told = "\n".join(proof.describe())
    assert "inconclusive at the attention of layer 0 (LlamaAttention)" in told
    assert "4 more places" in told


@pytest.mark.parametrize("option", ["position_bias", "head_mask", "cu_seq_lens_q"])
def test_an_option_that_is_not_known_is_refused_by_name(option: str) -> None:
    def change(network: Network) -> None:
        for layer in layers(network):
            inner = layer.self_attn.forward
            layer.self_attn.forward = lambda *a, inner=inner, **k: inner(*a, **k, **{option: 1})

    with pytest.raises(RejectedError, match=f"LlamaAttention asks its attention for {option}"):
        proof_of("llama", change, ranks=1)


def test_layers_that_want_more_than_tokens_and_positions() -> None:
    def change(network: Network) -> None:
        layers(network)[1].forward = lambda hidden, **rest: rest["image"]

    with pytest.raises(RejectedError, match="LlamaModel can't be run on some"):
        proof_of("llama", change)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("window", [None, 6, 128, 4096])
def test_the_probe_is_longer_than_any_window_and_not_divisible(
    ranks: int, window: int | None
) -> None:
    tokens, unseen = probe_length({"sliding_window": window}, ranks, 1 << 20)
    assert not unseen
    assert tokens > (window or 0)
    assert ranks == 1 or tokens % ranks


def test_a_window_beyond_the_probe_is_said() -> None:
    _, unseen = probe_length({"sliding_window": 32768}, 2, 1 << 20)
    assert "sliding_window is 32768" in unseen[0]
    _, unseen = probe_length({"sliding_window": 200}, 2, 150)
    assert "sliding_window is 200" in unseen[0]


def test_probes_hold_no_special_ids() -> None:
    ids = probe_ids({"pad_token_id": 0, "mask_token_id": 3, "eos_token_id": [1, 2]}, 7, 500)
    assert set(ids.tolist()) == {4, 5, 6}
