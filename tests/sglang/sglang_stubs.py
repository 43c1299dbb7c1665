# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The names that the plugin takes from SGLang, for machines where it is not installed."""

from __future__ import annotations

import contextlib
import enum
import importlib.machinery
import sys
import types
from types import SimpleNamespace

import torch


class AttentionType(enum.Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class RadixAttention(torch.nn.Module):
    """The attributes that the plugin reads."""

    def __init__(self, num_heads, head_dim, scaling, num_kv_heads, layer_id, **more):
        super().__init__()
        self.tp_q_head_num, self.tp_k_head_num = num_heads, num_kv_heads
        self.head_dim, self.scaling, self.layer_id = head_dim, scaling, layer_id
        defaults = {
            "logit_cap": 0.0,
            "logit_capping_method": "tanh",
            "sliding_window_size": -1,
            "is_cross_attention": False,
            "use_irope": False,
            "attn_type": AttentionType.DECODER,
            "pos_encoding_mode": "NONE",
            "xai_temperature_len": -1,
        }
        for name, value in {**defaults, **more}.items():
            setattr(self, name, value)


class AttentionBackend:
    """As SGLang's base class: the entry points of a step."""

    def init_forward_metadata(self, forward_batch):
        self.init_forward_metadata_out_graph(forward_batch)

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **more):
        mode = forward_batch.forward_mode
        run = self.forward_decode if mode.is_decode() else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)


class KVCache:
    """What SGLang's base class of pools keeps."""

    def __init__(
        self, size, page_size, dtype, layer_num, device, enable_memory_saver, start=None, end=None
    ):
        self.size, self.page_size, self.dtype, self.device = size, page_size, dtype, device
        self.layer_num, self.start_layer = layer_num, start or 0
        self.memory_saver_adapter = SimpleNamespace(region=lambda tag: contextlib.nullcontext())

    def _finalize_allocation_log(self, tokens):
        self.mem_usage = self.get_kv_size_bytes() / 2**30


class ForwardMode(enum.IntEnum):
    """The kinds of batches that the plugin tells apart."""

    EXTEND = enum.auto()
    DECODE = enum.auto()
    MIXED = enum.auto()
    IDLE = enum.auto()
    TARGET_VERIFY = enum.auto()

    def is_idle(self):
        return self == ForwardMode.IDLE

    def is_decode(self):
        return self == ForwardMode.DECODE

    def is_extend_or_draft_extend_or_mixed(self):
        return self in (ForwardMode.EXTEND, ForwardMode.MIXED)


def _unset():
    raise AssertionError("no configuration is published")


MODULES = {
    "sglang": {},
    "sglang.version": {"__version__": "0.0.0"},
    "sglang.srt": {},
    "sglang.srt.constants": {"GPU_MEMORY_TYPE_KV_CACHE": "kv_cache"},
    "sglang.srt.layers": {},
    "sglang.srt.layers.attention": {},
    "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
    "sglang.srt.layers.radix_attention": {
        "AttentionType": AttentionType,
        "RadixAttention": RadixAttention,
    },
    "sglang.srt.mem_cache": {},
    "sglang.srt.mem_cache.memory_pool": {"KVCache": KVCache},
    "sglang.srt.model_executor": {},
    "sglang.srt.model_executor.forward_batch_info": {"ForwardMode": ForwardMode},
    "sglang.srt.runtime_context": {"get_parallel": _unset},
}


def install():
    """Puts the names where the plugin imports them from."""
    for name, contents in MODULES.items():
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # find_spec asks for one
        for key, value in contents.items():
            setattr(module, key, value)
        sys.modules[name] = module
