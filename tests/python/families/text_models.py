# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Text families: dense, mixture of experts, sliding windows, recurrent layers."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from family import Built, Family
from models import COMMON, MIXED, left_padded, prompt, sizes_of

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_MAMBA = {
    "layer_types": ["mamba", "attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
_SHARED = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 97,
    "intermediate_size": [64] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
}
_GLM_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LLAMA4 = {
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 24,
    "num_local_experts": 4,
    "intermediate_size_mlp": 64,
    "num_experts_per_tok": 1,
}
_GEMMA4 = {"global_head_dim": 128, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
_GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_OPT = {
    "hidden_size": 128,
    "ffn_dim": 96,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 128,
    "max_position_embeddings": 512,
    "init_std": 0.15,
}

# title -> (class prefix, configuration)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, 3.x": ("Llama", sizes_of(128, 4, 2, 64)),
    "Llama 4 (text)": ("Llama4Text", sizes_of(128, 4, 2, 32) | _LLAMA4),
    "Qwen2, Qwen2.5": ("Qwen2", sizes_of(256, 4, 2)),
    "Qwen2-MoE": ("Qwen2Moe", sizes_of(128, 2, 1) | _EXPERTS | {"decoder_sparse_step": 1}),
    "Qwen3": ("Qwen3", sizes_of(96, 4, 1, 128)),
    "Qwen3-MoE": ("Qwen3Moe", sizes_of(128, 4, 2, 64) | _EXPERTS),
    "Qwen3-Next": ("Qwen3Next", sizes_of(128, 2, 1, 64) | _EXPERTS | _LINEAR),
    "Mistral": ("Mistral", sizes_of(128, 2, 2, 64) | {"sliding_window": None}),
    "Ministral 3": ("Ministral3", sizes_of(128, 4, 2, 64)),
    "Mixtral": ("Mixtral", sizes_of(128, 4, 2, 32) | {"num_local_experts": 4}),
    "Gemma 2": (
        "Gemma2",
        sizes_of(96, 4, 2, 64)
        | MIXED
        | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
    ),
    "Gemma 3 (text)": (
        "Gemma3Text",
        sizes_of(96, 2, 1, 256) | MIXED | {"query_pre_attn_scalar": 256},
    ),
    "Gemma 3n (text)": ("Gemma3nText", _SHARED),
    "Gemma 4 (text)": ("Gemma4Text", sizes_of(96, 2, 1, 64) | MIXED | _GEMMA4),
    "Phi-2": ("Phi", sizes_of(160, 2, 2)),
    "Phi-3, Phi-4": ("Phi3", sizes_of(192, 2, 2)),
    "gpt-oss": ("GptOss", sizes_of(128, 8, 2, 64) | MIXED | _GPT_OSS),
    "OLMo 2": ("Olmo2", sizes_of(128, 2, 1)),
    "OLMo 3": ("Olmo3", sizes_of(128, 2, 1) | MIXED),
    "SmolLM 3": ("SmolLM3", sizes_of(128, 4, 2) | {"no_rope_layers": [1, 0]}),
    "GLM-4": ("Glm4", sizes_of(128, 4, 2, 32)),
    "GLM-4.5 (MoE)": ("Glm4Moe", sizes_of(128, 2, 1, 64) | _GLM_MOE),
    "Granite": ("Granite", sizes_of(128, 4, 1)),
    "Granite 4 (hybrid)": ("GraniteMoeHybrid", sizes_of(128, 2, 1) | _MAMBA),
    "Cohere 2": ("Cohere2", sizes_of(128, 2, 1, 64) | MIXED | {"logit_scale": 1.0}),
    "EXAONE 4": ("Exaone4", sizes_of(128, 4, 2, 32) | MIXED),
    "ERNIE 4.5": ("Ernie4_5", sizes_of(128, 4, 2, 32)),
    "HunYuan": ("HunYuanDenseV1", sizes_of(128, 4, 2, 32)),
    "Seed-OSS": ("SeedOss", sizes_of(128, 4, 2, 32)),
    "StableLM 2": ("StableLm", sizes_of(160, 2, 1)),
    "StarCoder 2": ("Starcoder2", sizes_of(128, 2, 1) | {"sliding_window": None}),
    "OPT": ("OPT", _OPT),
    "GPT-NeoX, Pythia": (
        "GPTNeoX",
        {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 96},
    ),
}
_STATEFUL = {"Qwen3-Next", "Granite 4 (hybrid)"}


def _make(prefix: str, sizes: dict[str, Any]) -> Built:
    config = getattr(transformers, prefix + "Config")(**(COMMON | sizes))
    model = getattr(transformers, prefix.removesuffix("Text") + "ForCausalLM")(config)

    def batch() -> dict[str, Any]:
        ids, mask = left_padded(prompt(60, batch=3), [0, 13, 45])
        return {"input_ids": ids, "attention_mask": mask}

    cases = {
        "one": lambda: {"input_ids": prompt(60)},
        "batch": batch,
        "long": lambda: {"input_ids": prompt(200)},
    }
    return Built(model, cases)


TEXT = [
    Family(
        title,
        functools.partial(_make, *entry),
        ("one", "batch"),
        stateful=title in _STATEFUL,
        positionless=title == "Granite 4 (hybrid)",
    )
    for title, entry in _CONFIGS.items()
]
