# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The attention layer on packed pages, on the CPU and on CUDA devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from .. import _core
from ..plan import StepPlans
from ..serving.layout import SINKS, WINDOW, exact_dtype, format_of
from ..serving.sinks import restore_sinks
from ..serving.step import LayerSettings, run_step
from .ledger import Ledger
from .measured import calibration_of_layer
from .metadata import OscarMetadata
from .refuse import check_cache, check_engine, check_layer
from .ring import insert_rings, planned_block_tokens
from .spec import Geometry

_StepArrays = tuple[_core.CacheArrays, _core.CacheArrays]


class OscarImpl(AttentionImpl):  # type: ignore[misc]
    """One layer; the subclass of a device says which backend class its pages belong to."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        format = format_of(kv_cache_dtype)
        assert format is not None
        self.vllm_config = get_current_vllm_config()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.format, self.kv_cache_dtype = format, kv_cache_dtype
        softcap = float(logits_soft_cap or 0.0)
        self.settings = LayerSettings(format, WINDOW, SINKS, self.scale, softcap)
        self.sliding_window = None
        self.attn_type = attn_type
        check_engine(self.vllm_config)
        check_layer(
            format,
            num_heads,
            self.num_kv_heads,
            head_size,
            sliding_window=sliding_window,
            alibi_slopes=alibi_slopes,
            attn_type=attn_type,
            kv_sharing_target=kv_sharing_target_layer_name,
            extra=extra,
        )
        self.geometry = Geometry(
            format,
            self.num_kv_heads,
            head_size,
            planned_block_tokens(self.vllm_config.cache_config),
        )
        self.exact_dtype = exact_dtype(self.vllm_config.model_config.dtype)
        self.ledger: Ledger
        self._views: tuple[int, Tensor, Tensor] | None = None
        self._handed_over: tuple[Any, _StepArrays] | None = None

    def backend(self) -> Any:
        """The backend class whose pages are of this format."""
        raise NotImplementedError

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Adds the ring layers; called again when weights are reloaded."""
        main, self.ledger = insert_rings(self.vllm_config, self, self.geometry)
        main.attn_backend = self.backend()
        given = (self.vllm_config, main.layer_name, self.geometry)
        self.calibration = calibration_of_layer(*given)
        self._fixed = self.calibration.arrays()

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `forward` has the order of packing, attending and writing rows."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: OscarMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query ``[tokens, heads, head_dim]`` -> `output`, of the same shape, which is returned."""
        if attn_metadata is None:  # profile and warm-up runs
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("oscar-kv: quantised attention output is not supported")
        tokens = attn_metadata.tokens
        shape = (tokens, self.num_heads, self.head_size)
        # In the ring's dtype from the start: a token reads alike in its own chunk and in the next.
        k, v = (x[:tokens].to(self.exact_dtype) for x in (key, value))
        step, hits = attn_metadata.step, attn_metadata.hits
        run_step(
            self.settings,
            *self._arrays(kv_cache, attn_metadata),
            (query[:tokens], k, v),
            attn_metadata.query_start,
            output[:tokens].view(shape),
            max_query_len=attn_metadata.max_query_len,
            restore=None if hits is None else partial(self.restore, kv_cache, *hits),
            fault=self.ledger.fault,
            plans=None if step is None else StepPlans(self.ledger.plans, step.number, self),
        )
        return output

    def _arrays(self, kv_cache: Tensor, metadata: OscarMetadata) -> _StepArrays:
        """The arrays for packing, and those for all else; converted once for each batch size."""
        step, table = metadata.step, metadata.block_table
        if step is None:
            raise RuntimeError("oscar-kv: a ring group of this step is missing")
        key = (kv_cache.data_ptr(), table.data_ptr(), tuple(table.shape), step.context.data_ptr())
        if self._handed_over is None or self._handed_over[0] != key:
            pages, exact = self._cache_views(kv_cache)
            batch = (step.slot, step.context, step.exact_from)
            both = [
                _core.CacheArrays(pages, exact, x, *batch, *self._fixed)
                for x in (step.pack_table, table)
            ]
            self._handed_over = (key, (both[0], both[1]))
        return self._handed_over[1]

    def restore(self, kv_cache: Tensor, first: Tensor, slot: Tensor) -> None:
        """Sinks of requests that start with a prefix hit (sinks.py)."""
        pages, exact = self._cache_views(kv_cache)
        restore_sinks(pages, exact, first, slot, self.format, self.calibration)

    def _cache_views(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        address = kv_cache.data_ptr()
        if self._views is None or self._views[0] != address:
            check_cache(self.geometry, tuple(kv_cache.shape), kv_cache.is_contiguous())
            pages = self.geometry.pages(kv_cache)
            self._views = (address, pages, self.geometry.exact(kv_cache, self.exact_dtype))
        return self._views[1], self._views[2]
