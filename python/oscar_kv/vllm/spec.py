# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes of a vLLM block, and how the exact copies of a request fit into such blocks.

A block of N tokens is a page: uint8 ``[kv_heads, N / 32, tile_bytes]`` of one layer. The exact
copies of a request, K and V of 64 ring slots and 4 sinks in 16 bits, take 272 head_dim bytes a KV
head, as much as the pages of about 490 tokens. They lie in 1, 2 or 4 further blocks of the same
pool, ``[kv_heads, rows, head_dim]`` at the start of each (``exact_blocks`` in
include/oscar/cache.hpp).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _core
from ..serving.layout import SINKS, TILE_TOKENS, WINDOW, token_bytes

REPLAY = 64  # tokens of a prefix hit that are computed again: what a query may read exactly
BLOCK_TOKENS = (128, 256, 512)
DEFAULT_BLOCK_TOKENS = 128
_EXACT_BYTES = 2  # of an element of the exact copies


@dataclass(frozen=True)
class Geometry:
    """One layer's blocks: shapes of the pages and of the exact copies in the same memory."""

    format: str
    kv_heads: int
    head_dim: int
    block_tokens: int

    @property
    def tile_bytes(self) -> int:
        return TILE_TOKENS * token_bytes(self.head_dim, self.format)

    @property
    def block_bytes(self) -> int:
        return self.kv_heads * self.block_tokens // TILE_TOKENS * self.tile_bytes

    @property
    def exact_rows(self) -> int:
        """Rows of K (or V) and a KV head: ring and sinks."""
        return int(_core.ring_tokens(WINDOW)) + SINKS

    @property
    def exact_blocks(self) -> int:
        """Blocks for the exact copies of one request, 1, 2 or 4; ValueError where 4 do not do."""
        whole = 2 * self.kv_heads * self.exact_rows * self.head_dim * _EXACT_BYTES
        for blocks in (1, 2, 4):
            if whole <= blocks * self.block_bytes:
                return blocks
        raise ValueError(
            f"block_size is {self.block_tokens}: four blocks of {self.block_bytes} bytes do not "
            f"hold the {whole} bytes of exact copies"
        )

    @property
    def exact_shape(self) -> tuple[int, int, int, int]:
        """[planes, kv_heads, rows, head_dim] of the exact copies in one block."""
        blocks = self.exact_blocks
        rows = self.exact_rows // 2 if blocks == 4 else self.exact_rows
        return (2 if blocks == 1 else 1, self.kv_heads, rows, self.head_dim)

    def pages(self, kv_cache: Tensor) -> Tensor:
        """The pages in vLLM's uint8 ``[num_blocks, kv_heads, block_tokens, token_bytes]``."""
        tiles = self.block_tokens // TILE_TOKENS
        return kv_cache.view(kv_cache.shape[0], self.kv_heads, tiles, self.tile_bytes)

    def exact(self, kv_cache: Tensor, dtype: torch.dtype) -> Tensor:
        """The exact copies in the same memory, ``[num_blocks, *exact_shape]`` with gaps."""
        blocks = kv_cache.shape[0]
        flat = kv_cache.view(-1).view(dtype)
        planes, heads, rows, dim = self.exact_shape
        strides = (self.block_bytes // _EXACT_BYTES, heads * rows * dim, rows * dim, dim, 1)
        return flat.as_strided((blocks, planes, heads, rows, dim), strides)
