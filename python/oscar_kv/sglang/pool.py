# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The packed pages of all layers, and the exact memory of all request slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import KVCache
from torch import Tensor

from .. import _core
from ..serving.layout import SINKS, TILE_TOKENS, WINDOW, token_bytes


@dataclass(frozen=True)
class PoolShape:
    """Shapes of one rank's pool: page p of SGLang's allocator is page p of every layer."""

    format: str
    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    exact_dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        return self.layers * self.kv_heads * token_bytes(self.head_dim, self.format)

    @property
    def page(self) -> tuple[int, int, int]:
        """[kv_heads, tiles, tile_bytes] of one layer."""
        tile = int(_core.tile_bytes(self.head_dim, self.format))
        return (self.kv_heads, self.page_tokens // TILE_TOKENS, tile)

    @property
    def exact(self) -> tuple[int, int, int, int]:
        """[2, kv_heads, rows, head_dim] of one request and layer: ring and sinks of K and of V."""
        return (2, self.kv_heads, int(_core.ring_tokens(WINDOW)) + SINKS, self.head_dim)

    def exact_bytes(self, slots: int) -> int:
        """Of the exact copies of so many request slots in all layers."""
        elements = torch.Size(self.exact).numel()
        return slots * self.layers * elements * self.exact_dtype.itemsize


class OscarPool(KVCache):  # type: ignore[misc]
    """pages uint8 ``[num_pages, kv_heads, tiles, tile_bytes]`` of each layer; page 0 is nobody's.

    exact ``[slots, 2, kv_heads, rows, head_dim]`` of each layer, once the number of slots is known.
    """

    def __init__(
        self,
        shape: PoolShape,
        *,
        tokens: int,
        device: str,
        enable_memory_saver: bool,
        start_layer: int | None = None,
        end_layer: int | None = None,
    ) -> None:
        super().__init__(
            tokens,
            shape.page_tokens,
            torch.uint8,
            shape.layers,
            device,
            enable_memory_saver,
            start_layer,
            end_layer,
        )
        self.shape = shape
        num_pages = tokens // shape.page_tokens + 1
        self.pages = self._zeros((num_pages, *shape.page), torch.uint8)
        self.exact: list[Tensor] = []
        self._finalize_allocation_log(tokens)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            return [
                torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(self.layer_num)
            ]

    def allocate_exact(self, slots: int) -> None:
        """Exact memory for so many request slots, once."""
        if not self.exact:
            self.exact = self._zeros((slots, *self.shape.exact), self.shape.exact_dtype)

    def get_kv_size_bytes(self) -> int:
        """Bytes of the pages of all layers."""
        return sum(pages.nbytes for pages in self.pages)

    def layer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Pages and exact memory of a layer, by its number in the model."""
        index = layer_id - self.start_layer
        return self.pages[index], self.exact[index]

    def _no_rows(self) -> NoReturn:
        raise NotImplementedError(
            "oscar-kv: K and V of a packed pool are no rows that could be read or written by token"
        )

    def get_key_buffer(self, layer_id: int) -> NoReturn:
        """There is none."""
        self._no_rows()

    def get_value_buffer(self, layer_id: int) -> NoReturn:
        """There is none."""
        self._no_rows()

    def get_kv_buffer(self, layer_id: int) -> NoReturn:
        """There is none."""
        self._no_rows()

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> NoReturn:
        """The backend packs tiles itself."""
        self._no_rows()
