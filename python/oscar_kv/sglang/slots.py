# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Which request each slot belongs to, and from which position on its exact copies are valid.

A request keeps one row of SGLang's `ReqToTokenPool` while it has K and V; that row is its slot in
the exact memory. SGLang counts in `req_generation` how often a row was handed out, so a row whose
count has changed belongs to a request whose first step this is: what stands before the step comes
from the prefix cache and has no exact copy here. Hits end at a page, so at a tile.

Row 0 is nobody's: padded batches point to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One batch as the kernels need it, int32 on the cache's device.

    query_start [batch + 1]; slot, context (tokens before this step) and exact_from [batch]; table
    [batch, columns]: pages. They keep their address for each batch size, for CUDA graphs. hits:
    rows of the batch that start after a prefix hit, whose sinks have no exact copy yet.
    """

    query_start: Tensor
    slot: Tensor
    context: Tensor
    exact_from: Tensor
    table: Tensor
    max_query_len: int
    hits: list[int]


class Slots:
    """req_to_token int32 [rows, max tokens] and generation int64 [rows] (on the host) are SGLang's.

    They are looked at in every step; page_tokens is the size of its pages.
    """

    def __init__(self, req_to_token: Tensor, generation: Tensor, page_tokens: int) -> None:
        self._first = req_to_token[:, ::page_tokens]  # token index of each page's first token
        self._page_tokens = page_tokens
        self._generation = generation
        self._known = torch.full_like(generation, -1)
        self.rows, self._device = req_to_token.shape[0], req_to_token.device
        self._exact_from, self._end = self._int32(self.rows), self._int32(self.rows)
        self.reserve(self.rows)

    def _int32(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def _sent(self, on_host: Tensor) -> Tensor:
        """On the device, without waiting for what it is doing."""
        return on_host.to(self._device, non_blocking=True)

    def reserve(self, batch: int) -> None:
        """Room for so many rows in a batch; before the first step."""
        self._kept = (
            self._int32(batch + 1),
            *(self._int32(batch) for _ in range(3)),
            self._int32(batch, self._first.shape[1]),
        )

    def knows(self, row: int) -> bool:
        """Whether the exact copies of a row are those of its owner."""
        return bool(self._generation[row] == self._known[row])

    def advance_decode(self, slot: Tensor, end: Tensor) -> Step:
        """One token for each row: slot [batch], end [batch] (tokens after this step)."""
        query_start = torch.arange(slot.shape[0] + 1, device=self._device)
        return self._advance(slot.long(), end - 1, end, query_start, 1, [])

    def advance_extend(
        self,
        slot: Tensor,
        end: Tensor,
        counts: list[int],
        context: list[int],
        slot_on_host: Tensor | None = None,
    ) -> Step:
        """counts tokens for each row, which has `context` before them, as the host knows."""
        rows = slot.long()
        here = rows.cpu() if slot_on_host is None else slot_on_host.long()
        new = self._generation[here] != self._known[here]
        self._known[here] = self._generation[here]
        hits = [i for i, starts in enumerate(new.tolist()) if starts and context[i] > 0]
        before = self._sent(torch.tensor(context, dtype=torch.int32))
        starts = self._sent(new)
        for kept in (self._exact_from, self._end):
            kept[rows] = torch.where(starts, before, kept[rows])
        query_start = self._sent(torch.tensor([0, *counts]).cumsum(0))
        return self._advance(rows, before, end, query_start, max(counts), hits)

    def _advance(
        self,
        rows: Tensor,
        context: Tensor,
        end: Tensor,
        query_start: Tensor,
        max_query_len: int,
        hits: list[int],
    ) -> Step:
        goes_on = (self._end[rows] == context) | (rows == 0)
        # No wait for a device: there the message comes with a later call.
        torch._assert_async(
            goes_on.all(),
            "oscar-kv: a request does not go on where its exact copies end (a session that went "
            "back, or rows that were handed out behind SGLang's counter)",
        )
        self._end[rows] = end.int()
        values = (
            query_start,
            rows,
            context,
            self._exact_from[rows],
            self._first[rows] // self._page_tokens,
        )
        query_start, slot, context, exact_from, table = (
            kept[: x.shape[0]].copy_(x) for kept, x in zip(self._kept, values, strict=True)
        )
        return Step(query_start, slot, context, exact_from, table, max_query_len, hits)
