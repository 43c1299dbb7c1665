# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The metadata builder: one class for the pages' group and for each group of ring blocks.

vLLM builds the groups of a step one after the other, in any order. The builder whose group comes
last joins them: what is in the rings depends on all of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from .ledger import Step
from .refuse import check_block_size
from .ring import ExactRing
from .spec import REPLAY

_logger = logging.getLogger("vllm.oscar_kv")
_PAGES = -1  # part of the builder of the pages' group


@dataclass
class OscarMetadata(AttentionMetadata):
    """One group of one step; only that of the pages reaches a layer.

    step and hits are filled in once all groups have come, before any layer runs. hits: the page of
    token 0 and the ring blocks of requests that start after a prefix hit, int64 [hits] and [hits,
    exact_blocks]: each layer restores their sinks.
    """

    tokens: int
    max_query_len: int
    query_start: Tensor  # int32 [batch + 1]
    seq_len: Tensor  # int32 [batch], after this step
    block_table: Tensor  # int32 [batch, columns]
    starting: Tensor | None  # bool [batch] on the host: may start with a prefix hit; None: any may
    step: Step | None = None
    hits: tuple[Tensor, Tensor] | None = None


class OscarMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Builds `OscarMetadata` for the pages' group; the ring groups add their block tables."""

    _cudagraph_support = AttentionCGSupport.NEVER
    _host_sees_device = True  # looking at a tensor does not wait for kernels

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_block_size(kv_cache_spec.block_size)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        if isinstance(layer, ExactRing):
            self._part, self._ledger, self._main = layer.part, layer.ledger, layer.main
        else:
            self._part, self._ledger, self._main = _PAGES, layer.impl.ledger, layer
        self._ends = torch.zeros(0, dtype=torch.int64)  # of the rows of the last step, on the host
        if self._ledger.block_tokens != kv_cache_spec.block_size:
            raise RuntimeError(
                f"oscar-kv: vLLM settled on blocks of {kv_cache_spec.block_size} tokens, the ring "
                f"was laid out for {self._ledger.block_tokens}: pass --block-size"
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> OscarMetadata:
        """Metadata of this group; the last group of a step completes that of the pages."""
        common = common_attn_metadata
        requests = common.num_reqs
        built = OscarMetadata(
            tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start=common.query_start_loc[: requests + 1],
            seq_len=common.seq_lens[:requests],
            block_table=common.block_table_tensor[:requests],
            starting=self._starting(common) if self._part == _PAGES else None,
        )
        groups = self._ledger.groups
        if self._part in groups:  # the step before was given up half built
            groups.clear()
        groups[self._part] = built
        if len(groups) == self._ledger.exact_blocks + 1:
            self._join(groups)
            groups.clear()
        return built

    def _starting(self, common: CommonAttentionMetadata) -> Tensor | None:
        """What the host knows without the device: a hit ends at a block, less what is replayed.

        A request of one token that stands where its row ended the last time just goes on, and so
        does one that decodes (model runner V2 tells it; V1 counts a resumed request as decoding).
        """
        known = common.seq_lens_cpu_upper_bound
        if known is None:
            return None
        requests, block = common.num_reqs, self._ledger.block_tokens
        end, start = known[:requests].long(), common.query_start_loc_cpu[: requests + 1]
        count = start[1:] - start[:-1]
        context = end - count
        before = torch.full_like(end, -1)
        same = min(requests, self._ends.shape[0])
        before[:same] = self._ends[:same]
        self._ends = end
        at_hit = (context % block == 0) | (context % block == block - REPLAY)
        at_hit &= (context > 0) & ((count > 1) | (context != before))
        if common.req_idx is not None and common.is_prefilling is not None:
            prefilling = common.is_prefilling[:requests]
            at_hit[: prefilling.shape[0]] &= prefilling  # the rows behind are padding
        return at_hit

    def _join(self, groups: dict[int, OscarMetadata]) -> None:
        main = groups[_PAGES]
        rings = [groups[part].block_table[:, 0] for part in range(self._ledger.exact_blocks)]
        main.step = self._ledger.advance(
            self._main.kv_cache.shape[0], main.block_table, rings, main.query_start, main.seq_len
        )
        main.hits = self._hits(main, main.step)
        if main.hits is not None and main.max_query_len == 1:
            # No layer may run Python now (a CUDA graph), nor is it too early: the page of token 0
            # is full, and with one token a request nobody fills a page from its start.
            for layer in self._ledger.layers.values():
                layer.impl.restore(layer.kv_cache, *main.hits)
            main.hits = None
        self._report_fault()

    def _report_fault(self) -> None:
        """An engine serves on: on a CUDA device such a value was replaced (docs/format.md)."""
        fault = self._ledger.fault
        if fault is None:
            return
        try:
            fault.check()
        except ValueError as error:
            fault.clear()
            _logger.error("oscar-kv: %s", error)

    def _hits(self, main: OscarMetadata, step: Step) -> tuple[Tensor, Tensor] | None:
        if self._host_sees_device:
            rows = step.fresh.nonzero().flatten()
        elif main.starting is None:
            rows = torch.arange(step.fresh.shape[0])
        else:
            rows = main.starting.nonzero().flatten()
        if rows.numel() == 0:
            return None
        rows = rows.to(step.fresh.device, non_blocking=True)
        # Block 0 is nobody's: what is restored there is never read.
        slot = step.slot.view(step.fresh.shape[0], -1)[rows] * step.fresh[rows, None]
        return main.block_table[rows, 0].long(), slot.long()
