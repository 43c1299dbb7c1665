# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The names that the plugin takes from vLLM, for machines where vLLM cannot be installed.

Only what the layer and the metadata builder use; with vLLM at hand the same tests run on the real
classes.
"""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass

import torch


class AttentionType(str, enum.Enum):
    DECODER = "decoder"


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class KVQuantMode(enum.IntEnum):
    NONE = 0
    CUSTOM = 12


class KVCacheLayout(enum.Enum):
    LBHNC = 0


class MultipleOf:
    def __init__(self, base):
        self.base = base


class Plain:
    """A base class without anything in it."""


class AttentionMetadataBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names
        self.vllm_config, self.device = vllm_config, device


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    is_prefilling: torch.Tensor | None = None
    seq_lens_cpu_upper_bound: torch.Tensor | None = None
    req_idx: object = None


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    dtype: torch.dtype
    kv_quant_mode: KVQuantMode = KVQuantMode.NONE
    state_content_bytes: int | None = None


class FullAttentionSpec(AttentionSpec):
    pass


class CircularBufferSpec(AttentionSpec):
    pass


class CPUAttentionBackend:
    supported_kv_cache_dtypes = ("auto",)


def _unset():
    raise AssertionError("no configuration is set")


MODULES = {
    "vllm": {},
    "vllm.config": {"get_current_vllm_config": _unset},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": Plain},
    "vllm.v1": {},
    "vllm.v1.attention": {},
    "vllm.v1.attention.backend": {
        "AttentionBackend": Plain,
        "AttentionCGSupport": AttentionCGSupport,
        "AttentionImpl": Plain,
        "AttentionMetadata": Plain,
        "AttentionMetadataBuilder": AttentionMetadataBuilder,
        "AttentionType": AttentionType,
        "CommonAttentionMetadata": CommonAttentionMetadata,
        "MultipleOf": MultipleOf,
    },
    "vllm.v1.attention.backends": {},
    "vllm.v1.attention.backends.cpu_attn": {
        "CPUAttentionBackend": CPUAttentionBackend,
        "CPUAttentionBackendImpl": Plain,
    },
    "vllm.v1.kv_cache_interface": {
        "CircularBufferSpec": CircularBufferSpec,
        "FullAttentionSpec": FullAttentionSpec,
        "KVCacheLayout": KVCacheLayout,
        "KVQuantMode": KVQuantMode,
    },
}


def install():
    """Puts the names where the plugin imports them from."""
    for name, contents in MODULES.items():
        module = types.ModuleType(name)
        module.__path__ = []
        for key, value in contents.items():
            setattr(module, key, value)
        sys.modules[name] = module
