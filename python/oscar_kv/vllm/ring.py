# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Layers that make vLLM give each request blocks for its exact copies.

``CircularBufferSpec`` is one block a request, for its whole life and never shared. n such layers
beside each attention layer become n KV-cache groups, each with a block table of one column. All
groups draw from one pool and block b is b in every layer's tensor, so the exact copies of a layer
lie in that layer's own tensor, at the n block numbers of the request.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import CircularBufferSpec

from .ledger import Ledger
from .refuse import check_block_size
from .spec import DEFAULT_BLOCK_TOKENS, REPLAY, Geometry

_SUFFIX = ".oscar_ring_"
_NAMES = "abcd"


class ExactRingSpec(CircularBufferSpec):  # type: ignore[misc]
    """One block a request, filled again after a prefix hit."""

    @property
    def prefix_replay_tokens(self) -> int:
        """vLLM's scheduler goes back by so many tokens after a hit and computes them again."""
        return REPLAY


class ExactRing(nn.Module, AttentionLayerBase):
    """One ring block a request, beside the attention layer `main`."""

    def __init__(self, main: Any, part: int, ledger: Ledger) -> None:
        super().__init__()
        # Not as attributes that nn.Module would take for its children.
        object.__setattr__(self, "main", main)
        self.part = part
        self.ledger = ledger

    def get_attn_backend(self) -> Any:
        """The class of the main layer: with two classes vLLM ignores the preferred block size."""
        return self.main.get_attn_backend()

    def get_kv_cache_spec(self, vllm_config: Any) -> ExactRingSpec:
        """As many bytes as a page of the main layer, so that both come from one pool."""
        page = self.get_attn_backend().customize_spec(self.main.get_kv_cache_spec(vllm_config))
        return ExactRingSpec(
            block_size=page.block_size,
            num_kv_heads=page.num_kv_heads,
            head_size=page.head_size,
            head_size_v=0,
            dtype=page.dtype,
            kv_quant_mode=page.kv_quant_mode,
            state_content_bytes=page.state_content_bytes,
        )


def planned_block_tokens(cache_config: Any) -> int:
    """The block size before vLLM has settled it; the metadata builder checks that it holds."""
    given = cache_config.user_specified_block_size
    tokens = cache_config.block_size if given else DEFAULT_BLOCK_TOKENS
    check_block_size(tokens)
    return int(tokens)


def insert_rings(vllm_config: Any, impl: Any, geometry: Geometry) -> tuple[Any, Ledger]:
    """Adds the ring layers of the attention layer of `impl` to vLLM's layers, once.

    Returns the attention layer and the ledger that all layers of an engine share.
    """
    layers = vllm_config.compilation_config.static_forward_context
    name, main = next((n, x) for n, x in layers.items() if getattr(x, "impl", None) is impl)
    rings = [x for x in layers.values() if isinstance(x, ExactRing)]
    blocks = geometry.exact_blocks
    most = vllm_config.scheduler_config.max_num_seqs
    ledger = rings[0].ledger if rings else Ledger(blocks, geometry.block_tokens, most)
    ledger.layers[name] = main
    if name + _SUFFIX + _NAMES[0] not in layers:
        for part in range(blocks):
            layers[name + _SUFFIX + _NAMES[part]] = ExactRing(main, part, ledger)
    return main, ledger
