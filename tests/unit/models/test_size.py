"""What a model takes of a rank, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mdattn_mpi.costs import typical_costs
from mdattn_mpi.models.folder import ModelFolder, Weight
from mdattn_mpi.models.size import ModelSize, Shape
from mdattn_mpi.problem import ModelProblem

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
GPU = typical_costs("cuda", 64 << 30)


def llama() -> ModelSize:
    layers = [
        Weight(f"model.layers.{n}.{name}.weight", shape, "BF16", Path("x"), 0, 0)
        for n in range(32)
        for name, shape in {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
            "input_layernorm": (4096,),
        }.items()
    ]
    ends = [
        Weight(name, (128256, 4096), "BF16", Path("x"), 0, 0)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    ]
    return ModelSize(ModelFolder(Path("x"), LLAMA_8B, (*layers, *ends)), "bfloat16", True, False)


def problem(tokens: int) -> ModelProblem:
    return ModelProblem(tokens, ())


def test_operations_are_those_of_weights_and_attention() -> None:
    size, tokens = llama(), 1 << 17
    weights = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    pairs = tokens * (tokens + 1) // 2
    assert size.flops(tokens) == 2 * weights * tokens + 32 * 4 * pairs * 32 * 128


def test_a_million_tokens_fit_two_gpus_and_not_one() -> None:
    size = llama()
    assert 14 << 30 < size.nbytes < 17 << 30
    assert size.memory(problem(1 << 20), 2, GPU) < GPU.memory
    assert size.memory(problem(1 << 20), 1, GPU) > GPU.memory
    assert "weights 15 GiB" in size.describe(problem(1 << 20), 2, GPU)


def test_more_ranks_take_less_time_and_memory_each() -> None:
    size = llama()
    for tokens in (1 << 14, 1 << 18):
        seconds = [size.seconds(problem(tokens), ranks, GPU) for ranks in (1, 2, 4)]
        memory = [size.memory(problem(tokens), ranks, GPU) for ranks in (1, 2, 4)]
        assert seconds == sorted(seconds, reverse=True)
        assert memory == sorted(memory, reverse=True)
        assert seconds[0] < 2.5 * seconds[1]


@pytest.mark.parametrize(
    "config",
    [
        {"n_embd": 64, "n_layer": 3, "n_head": 4},
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
        {"text_config": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}},
        {"dim": 64, "n_layers": 3, "n_heads": 4},
    ],
    ids=json.dumps,
)
def test_families_name_their_sizes_differently(config: dict[str, object]) -> None:
    assert Shape.of(config) == Shape(3, 64, 256, 4, 4, 16)


def test_of_a_mixture_the_experts_in_use_count() -> None:
    config = {**LLAMA_8B, "num_local_experts": 8, "num_experts_per_tok": 2}
    expert = Weight("model.layers.0.mlp.experts.down_proj", (8, 64, 32), "BF16", Path("x"), 0, 0)
    router = Weight("model.layers.0.mlp.router.weight", (8, 32), "BF16", Path("x"), 0, 0)
    folder = ModelFolder(Path("x"), config, (expert, router))
    size = ModelSize(folder, "bfloat16", True, False)
    assert size.multiplied == 2 * 64 * 32 + 8 * 32


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [(16384, 0.0362), (65536, 0.2218), (131072, 0.666), (262144, 2.234)],
)
def test_what_was_measured_on_two_h200s_is_about_what_is_estimated(
    tokens: int, seconds: float
) -> None:
    """Four layers, FlashAttention (docs/performance.md, whole models)."""
    size = llama()
    four = ModelSize(
        ModelFolder(Path("x"), {**LLAMA_8B, "num_hidden_layers": 4}, size.folder.weights[: 4 * 8]),
        *("bfloat16", True, False),
    )
    flash = replace(GPU, flops=1.09 * GPU.flops, memory=0)
    assert four.seconds(problem(tokens), 2, flash) == pytest.approx(seconds, rel=0.15)


def test_a_core_multiplies_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="needs the extra transformers")
    pytest.importorskip("transformers", reason="needs the extra transformers")
    from mdattn_mpi.models import speed

    monkeypatch.setattr(speed, "SECONDS", 0.01)
    assert 1e6 < speed.core_dense_flops(64, "bfloat16") < 1e14


def test_a_million_tokens_through_32_layers_take_about_as_long_as_measured() -> None:
    """246.8 s on two H200s."""
    flash = replace(GPU, flops=1.09 * GPU.flops, memory=0)
    assert llama().seconds(problem(1 << 20), 2, flash) == pytest.approx(246.8, rel=0.15)
