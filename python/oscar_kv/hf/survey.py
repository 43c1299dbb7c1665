# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model can be packed, and why the others stay as transformers keeps them.

Decided by what a layer's cache holds (its class, head sizes, widths of K and V), not by the name of
the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from ..balance import text_config

_MAX_GROUP = 16  # query heads of a KV head


@dataclass(frozen=True)
class Survey:
    """packed: layers that can be packed; kept: layer -> why it stays as transformers keeps it."""

    packed: tuple[int, ...]
    kept: dict[int, str]

    @property
    def reasons(self) -> dict[str, list[int]]:
        """Reason -> the layers that stay for it."""
        found: dict[str, list[int]] = {}
        for layer, reason in self.kept.items():
            found.setdefault(reason, []).append(layer)
        return found

    def __str__(self) -> str:
        """Such as "1 of 3 layers packed; not packed: 0, 2 (sliding window of 24 tokens)"."""
        total = len(self.packed) + len(self.kept)
        text = f"{len(self.packed)} of {total} layers packed"
        parts = [f"{_ranges(layers)} ({reason})" for reason, layers in self.reasons.items()]
        return f"{text}; not packed: {', '.join(parts)}" if parts else text


def survey(config: PreTrainedConfig) -> Survey:
    """Looks at the decoder of a (possibly composite) model configuration."""
    return survey_layers(text_config(config), DynamicCache(config=config).layers)


def survey_layers(text: PreTrainedConfig, layers: list[Any]) -> Survey:
    """The same from the decoder's configuration and the layers of transformers' own cache."""
    configs = getattr(text, "per_layer_config", None) or [text] * len(layers)
    cross = getattr(text, "cross_attention_layers", None) or ()
    kept = {}
    for index, (layer, config) in enumerate(zip(layers, configs, strict=False)):
        reason = "cross-attention" if index in cross else _reason(layer, config)
        if reason:
            kept[index] = reason
    return Survey(tuple(i for i in range(len(layers)) if i not in kept), kept)


def _reason(layer: Any, config: Any) -> str:
    """Why this layer cannot be packed; "" if it can."""
    if type(layer) is not DynamicLayer:
        return _other_kind(layer)
    if getattr(config, "kv_lora_rank", None):
        return f"caches latents (MLA, kv_lora_rank={config.kv_lora_rank})"
    if getattr(config, "relative_attention_num_buckets", None):
        return "adds a position bias to its scores"
    q_heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or q_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // q_heads)
    v_dim = int(getattr(config, "v_head_dim", None) or head_dim)
    if v_dim != head_dim:
        return f"K of width {head_dim} and V of width {v_dim} differ"
    if q_heads % kv_heads or q_heads // kv_heads > _MAX_GROUP:
        return (
            f"{q_heads} query heads over {kv_heads} KV heads, the ratio must be an integer from 1 "
            f"to {_MAX_GROUP}"
        )
    return _head_dim_error(head_dim)


def _other_kind(layer: Any) -> str:
    if getattr(layer, "is_sliding", False):
        return f"sliding window of {getattr(layer, 'sliding_window', '?')} tokens"
    name = type(layer).__name__
    if name == "DummyLayer":
        return "no K and V of its own"
    if name == "LinearAttentionLayer":
        return "linear attention"
    return f"kept in a {name}"


def _head_dim_error(head_dim: int) -> str:
    from .. import _core

    try:
        _core.tile_bytes(head_dim, "k2v2")
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def _ranges(layers: list[int]) -> str:
    """Such as "0-3, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
