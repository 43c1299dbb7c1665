# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Families of which nothing can be packed."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from family import Built, Family
from models import tiny

_MLA = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
}
_T5 = {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 32}


def _make(prefix: str, head: str = "ForCausalLM", **config: Any) -> Built:
    config_class = getattr(transformers, prefix + "Config")
    return Built(getattr(transformers, prefix + head)(config_class(vocab_size=97, **config)), {})


def _family(title: str, reason: str, prefix: str, *head: str, **config: Any) -> Family:
    return Family(title, functools.partial(_make, prefix, *head, **config), (), refused=reason)


def _sliding() -> Built:
    return Built(tiny("mistral", sliding_window=16), {})


_NO_INTERFACE = "does not use transformers' attention interface"

REFUSED = [
    _family("DeepSeek-V2, -V2-Lite", "MLA, kv_lora_rank=32", "DeepseekV2", **_MLA),
    _family("DeepSeek-V3, -R1", "MLA, kv_lora_rank=32", "DeepseekV3", **_MLA),
    Family("Mistral-7B-v0.1", _sliding, (), refused="every attention layer is a sliding-window"),
    _family("T5", "adds a position bias", "T5", "ForConditionalGeneration", **_T5),
    _family("Falcon", _NO_INTERFACE, "Falcon", hidden_size=128, num_attention_heads=2),
    _family("BLOOM", _NO_INTERFACE, "Bloom", hidden_size=128, n_layer=1, n_head=2),
    _family("Mamba", "no attention layers", "Mamba", hidden_size=64, num_hidden_layers=1),
]
