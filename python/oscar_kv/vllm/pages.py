# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What the packed backends of both devices tell vLLM about their pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from ..serving.layout import TILE_TOKENS, token_bytes
from .spec import DEFAULT_BLOCK_TOKENS


class PackedPages:
    """Mixin of a backend class; `format` is that of its pages.

    vLLM asks a backend class for the size of a page without saying which dtype it is for, so each
    format has a class of its own, which a layer gets once its dtype is known (attention.py).
    """

    format = ""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """A page of `token_bytes` a token and KV head; other kinds of layers stay as they are."""
        if type(spec) is not FullAttentionSpec or spec.state_content_bytes is not None:
            return spec
        content = token_bytes(spec.head_size, cls.format)
        return replace(spec, dtype=torch.uint8, state_content_bytes=content)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Whole tiles."""
        return [MultipleOf(TILE_TOKENS)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """128: the finest prefix hits."""
        return DEFAULT_BLOCK_TOKENS

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layers outside blocks, heads outside tokens."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: it would move pages without the exact copies."""
        return False
