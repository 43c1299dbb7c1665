# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""From which position on a request's exact copies are valid.

vLLM tells a metadata builder neither who a request is nor whether this is its first step. A request
that starts with a prefix-cache hit finds someone else's rows in its ring blocks, one that goes on
finds its own. The ledger tells the two apart by what it noted itself. It stamps all blocks that a
step writes, ring blocks and pages, with a number that only this request in this step has, and
keeps, at the first ring block, how that request stood then. A request goes on if its ring blocks
still bear that one stamp, it stands where their owner stood, and the page of its last token bears
the stamp that the owner's last page had. Should that be another request, it has the same tokens,
and the rows are right.

After a hit vLLM computes the last `REPLAY` tokens of the prefix again (ring.py), so that the window
has exact copies as in a cold start. The pages of these tokens are shared and stay as they are:
`pack_table` leads to block 0 in their stead, which is nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..device import FaultWord
from ..plan import SharedPlans
from ..serving.layout import TILE_TOKENS

_ROWS = 1 << 20  # more than a batch has requests


@dataclass
class Step:
    """One batch as the kernels need it, int32 on the cache's device.

    context [batch]: tokens before this step; slot [batch, exact_blocks] (or [batch] of one): ring
    blocks; exact_from [batch]: first position with an exact copy; pack_table [batch, columns]: the
    block table for writing. These keep their address from step to step, for CUDA graphs. fresh bool
    [batch]: requests whose first step this is, after a hit: their sinks have no exact copy. number:
    of this step, among all.
    """

    context: Tensor
    slot: Tensor
    exact_from: Tensor
    pack_table: Tensor
    fresh: Tensor
    number: int


@dataclass
class _Notes:
    """What is known of each block; all but `stamp` of the first ring block of a request."""

    stamp: Tensor  # of the last write, as a ring block or as a page
    owner: Tensor  # the stamp it had as the first ring block
    end: Tensor  # tokens of its owner then
    page_stamp: Tensor  # the stamp of the page of the owner's last token
    exact_from: Tensor
    packed_from: Tensor  # first token that the owner packs itself

    @classmethod
    def of(cls, blocks: int, device: torch.device) -> _Notes:
        return cls(*torch.zeros((len(fields(cls)), blocks), dtype=torch.int64, device=device))


class Ledger:
    """Notes on all blocks of one engine, `exact_blocks` ring blocks a request.

    max_batch: requests of a step. layers: the attention layers of this engine, by name. groups: of
    the step being built (metadata.py). fault: where a CUDA device says that K or V was not finite.
    plans: of attention, which the layers of a step share.
    """

    def __init__(self, exact_blocks: int, block_tokens: int, max_batch: int) -> None:
        self.exact_blocks, self.block_tokens = exact_blocks, block_tokens
        self.max_batch = max_batch
        self.layers: dict[str, Any] = {}
        self.groups: dict[int, Any] = {}
        self.fault: FaultWord | None = None
        self.plans = SharedPlans()
        self._clock = 0
        self._shape: tuple[Any, ...] = ()

    def _allocate(self, num_blocks: int, table: Tensor) -> None:
        shape = (num_blocks, table.shape[1], table.device)
        if self._shape == shape:
            return
        self._shape = shape
        self._notes = _Notes.of(num_blocks, table.device)
        if table.device.type == "cuda":
            self.fault = FaultWord(table.device)
        columns = (self.exact_blocks, 1, 1, table.shape[1])
        flat = torch.zeros(sum(columns) * self.max_batch, dtype=torch.int32, device=table.device)
        self._kept = flat.split([n * self.max_batch for n in columns])

    def advance(
        self, num_blocks: int, table: Tensor, rings: list[Tensor], query_start: Tensor, end: Tensor
    ) -> Step:
        """Notes one step and says what its requests may read. No synchronisation.

        table: int32 [batch, columns], pages; rings: exact_blocks tensors int32 [batch]; query_start
        int32 [batch + 1]; end: int32 [batch], tokens after this step.
        """
        batch = table.shape[0]
        if batch > self.max_batch:
            raise RuntimeError(
                f"oscar-kv: {batch} requests in a step, max_num_seqs is {self.max_batch}"
            )
        self._allocate(num_blocks, table)
        notes = self._notes
        slot = torch.stack(rings, dim=1)
        ring, first = slot.long(), slot[:, 0].long()
        end = end.long()
        context = end - (query_start[1:] - query_start[:-1])
        goes_on = (context % TILE_TOKENS != 0) | self._same(table, ring, context)
        fresh = ~goes_on & (context > 0)
        exact_from = torch.where(goes_on, notes.exact_from[first], context)
        exact_from = torch.where(context == 0, 0, exact_from)
        hit = (context + self.block_tokens - 1) // self.block_tokens * self.block_tokens
        packed_from = torch.where(goes_on, notes.packed_from[first], hit)
        packed_from = torch.where(context == 0, 0, packed_from)
        pack_table = self._pack_table(table, packed_from)
        self._note(table, pack_table, ring, context, end)
        notes.exact_from[first], notes.packed_from[first] = exact_from, packed_from
        kept = [
            buffer[: x.numel()].view(x.shape).copy_(x)
            for buffer, x in zip(self._kept, (slot, context, exact_from, pack_table), strict=True)
        ]
        slot = kept[0][:, 0] if self.exact_blocks == 1 else kept[0]
        return Step(kept[1], slot, kept[2], kept[3], fresh, self._clock)

    def _last_page(self, table: Tensor, tokens: Tensor) -> Tensor:
        column = (tokens - 1).clamp(min=0) // self.block_tokens
        return table.gather(1, column[:, None]).squeeze(1).long()

    def _same(self, table: Tensor, ring: Tensor, context: Tensor) -> Tensor:
        notes, first = self._notes, ring[:, 0]
        page = self._last_page(table, context)
        same = (notes.stamp[ring] == notes.owner[first, None]).all(1)
        return same & (notes.end[first] == context) & (notes.page_stamp[first] == notes.stamp[page])

    def _pack_table(self, table: Tensor, packed_from: Tensor) -> Tensor:
        column = torch.arange(1, table.shape[1] + 1, device=table.device)[None, :]
        return torch.where(column * self.block_tokens <= packed_from[:, None], 0, table)

    def _note(
        self, table: Tensor, pack_table: Tensor, ring: Tensor, context: Tensor, end: Tensor
    ) -> None:
        notes, first = self._notes, ring[:, 0]
        self._clock += 1
        stamp = self._clock * _ROWS + torch.arange(ring.shape[0], device=ring.device)
        low, high = context // TILE_TOKENS, end // TILE_TOKENS
        per_page = self.block_tokens // TILE_TOKENS
        column = torch.arange(table.shape[1], device=table.device)[None, :]
        packed = (column >= (low // per_page)[:, None]) & (column * per_page < high[:, None])
        packed &= (high > low)[:, None]
        pages = torch.where(packed, pack_table, 0).long()
        notes.stamp[pages] = stamp[:, None].expand_as(pages)
        notes.stamp[ring] = stamp[:, None].expand_as(ring)
        notes.owner[first], notes.end[first] = stamp, end
        notes.page_stamp[first] = notes.stamp[self._last_page(table, end)]
