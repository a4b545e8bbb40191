"""Tiny models of many families, made with Transformers' own classes, saved as folders.

Small random weights make attention nearly uniform, and wrong attention looks right. Here scores
have a standard deviation of about 2, windows are shorter than the sequences of the tests, and the
embeddings are as large as what attention adds to them; `locality` proves it.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY = 96
SPECIAL = 8  # ids below are special ones: start, end, padding, mask
WINDOW = 6  # tokens
MAX_POSITIONS = 160  # of the models that learn positions
SHARPNESS = 1.5  # queries and keys are that much larger than 1

_ROTARY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 1,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
# Transformers' names of a config and of the class that holds the whole model, and what differs.
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _ROTARY),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _ROTARY),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_ROTARY, "sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **_ROTARY,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_ROTARY,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_ROTARY,
            "sliding_window": WINDOW,
            "layer_types": _SLIDING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_positions": MAX_POSITIONS,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "bert": ("BertConfig", "BertModel", _ENCODER),
    "roberta": (
        "RobertaConfig",
        "RobertaModel",
        {**_ENCODER, "max_position_embeddings": MAX_POSITIONS + 2, "type_vocab_size": 1},
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        {
            **_ENCODER,
            "max_position_embeddings": 512,
            "local_attention": 2 * WINDOW,
            "global_attn_every_n_layers": 2,
            "bos_token_id": 0,
            "cls_token_id": 0,
            "sep_token_id": 2,
            "eos_token_id": 2,
        },
    ),
    "esm": (
        "EsmConfig",
        "EsmModel",
        {
            **_ENCODER,
            "position_embedding_type": "rotary",
            "token_dropout": True,  # as ESM-2 has it
            "mask_token_id": 3,
        },
    ),
}
CAUSAL = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt-oss", "gpt2")
WINDOWED = ("mistral", "gemma2", "gemma3", "gpt-oss", "modernbert")


@cache
def tiny_model(family: str, seed: int = 0) -> Path:
    """Make a folder with config.json and safetensors, once a process; float32, gone at its end."""
    folder = Path(tempfile.mkdtemp(prefix=f"mdattn-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_model(family, seed).save_pretrained(folder)
    return folder


def make_model(family: str, seed: int = 0) -> Any:
    """Make the model, in eval mode, with weights that are drawn anew."""
    import torch
    import transformers

    config_name, model_name, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, model_name)(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                parameter.copy_(_drawn(f"{name}.{own}", module, parameter, draw))
        model.tie_weights()
    return model


def _drawn(name: str, module: Any, parameter: Any, draw: Any) -> Any:
    """Draw a weight so that what comes out is about as large as what goes in."""
    import torch

    normal = torch.randn(parameter.shape, generator=draw)
    kind = type(module).__name__
    if "Embedding" in kind:
        return normal
    if parameter.ndim == 1:
        if "norm" in kind.lower() and name.endswith("weight"):
            ones = 0.0 if kind.startswith("Gemma") else 1.0  # Gemma adds 1 to its weights
            sharper = SHARPNESS - 1 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.0
            return ones + sharper + 0.1 * normal
        return normal if name.endswith("sinks") else 0.1 * normal
    inputs = parameter.shape[-1 if kind == "Linear" else -2]
    sharp = any(part in name for part in ("q_proj", "k_proj", "query", "key", "c_attn", "Wqkv"))
    return normal * (SHARPNESS if sharp else 1.0) / inputs**0.5


def random_ids(tokens: int, seed: int = 0) -> Any:
    """Draw token ids `[tokens]`, int64, none of them special."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    return torch.randint(SPECIAL, VOCABULARY, (tokens,), generator=draw)


def hidden_state(folder: Path, ids: Any, dtype: str = "float32") -> Any:
    """Run the model in one process with its own eager attention: ``[S, D]``."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(torch.as_tensor(ids)[None]).last_hidden_state[0]


def locality(family: str, tokens: int, ranks: int) -> list[float]:
    """How much every layer's attention changes when it sees only the tokens of its own rank.

    The negative control: relative L2 distance at the output of each attention, whose inputs are
    those of the whole model.
    """
    import torch
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    changed: list[float] = []
    rank = torch.arange(tokens) * ranks // tokens
    apart = torch.where(rank[:, None] == rank[None, :], 0.0, -torch.inf)

    def both(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        mask = torch.zeros(tokens, tokens) if mask is None else mask
        whole, local = (_eager(module, q, k, v, mask + more, options) for more in (0.0, apart))
        changed.append(float((whole - local).norm() / whole.norm()))
        return whole, None

    AttentionInterface.register("locality", both)
    AttentionMaskInterface.register("locality", eager_mask)
    model = make_model(family)
    model.set_attn_implementation("locality")
    with torch.inference_mode():
        model(random_ids(tokens)[None])
    return changed


def _eager(module: Any, q: Any, k: Any, v: Any, mask: Any, options: Mapping[str, Any]) -> Any:
    """Attention by its definition, with softcap and sinks: `[B, S, N, H]`."""
    import torch

    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    scores = q @ k.transpose(2, 3) * scale
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores + mask
    if options.get("s_aux") is not None:
        sinks = options["s_aux"].reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2).contiguous()
