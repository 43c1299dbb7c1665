# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What one request of a serving engine must read: a `PagedCache` of its own, fed alone.

K, V and Q of a token are random numbers that depend on the tokens before it alone, as in a model.
"""

from __future__ import annotations

import torch
from oscar_kv import PagedCache, _core, ops
from oscar_kv.serving.layout import SINKS, WINDOW


class Oracle:
    """shape (heads, kv_heads, head_dim); tokens: ids, all of them known from the start.

    hit: tokens whose pages another request has packed; done: tokens that need not be computed,
    which may be fewer, where an engine computes the last of a hit again.
    """

    def __init__(self, shape, format, tokens, hit=0, done=0):
        self.shape, self.tokens, self.hit = shape, tuple(tokens), hit
        _, kv_heads, head_dim = shape
        self.cache = PagedCache(1, kv_heads, head_dim, torch.bfloat16, format=format)
        if hit:
            _, k, v = self.rows(0, hit, again=False)
            self.cache.append(k, v)
            self._sinks_as_packed()
            self.cache.exact[:, :, :, :-SINKS] = torch.nan
            self.cache.lengths, self.cache.exact_start = [done], [done]
            self.cache.seq_len.fill_(done)
            self.cache.exact_from.fill_(done)

    def rows(self, first, end, again=True):
        """q, k, v bfloat16 ``[end - first, heads, head_dim]``."""
        heads, kv_heads, head_dim = self.shape
        q, k, v = [], [], []
        for position in range(first, end):
            seed = hash(self.tokens[: position + 1]) & 0x7FFFFFFF
            generator = torch.Generator().manual_seed(seed)
            row = torch.randn((heads + 2 * kv_heads, head_dim), generator=generator)
            if again and position < self.hit:
                # Computed again over packed tokens: not quite what it was.
                row += 0.1 * torch.randn(row.shape, generator=generator)
            q.append(row[:heads])
            k.append(row[heads : heads + kv_heads])
            v.append(row[heads + kv_heads :])
        return [torch.stack(x).bfloat16() for x in (q, k, v)]

    def _sinks_as_packed(self):
        """Sinks as the codes say, by the library's own decoder."""
        _, kv_heads, head_dim = self.shape
        cache = self.cache
        one_tile = torch.tensor([32], dtype=torch.int32)
        ring = cache.exact[:, :, :, :-SINKS].contiguous()
        pages = (cache.pool.storage, ring, cache.block_table, cache.slot)
        dense = [torch.zeros(1, kv_heads, 32, head_dim) for _ in range(2)]
        arrays = _core.CacheArrays(*pages, one_tile, one_tile, None)
        _core.dequantize(arrays, *dense, cache.format, WINDOW, 0)
        for side in range(2):
            cache.exact[0, side, :, -SINKS:] = dense[side][0, :, :SINKS].bfloat16()

    def step(self, q, k, v, softcap=0.0):
        """Attention of the next tokens; pages of the prefix stay what they were."""
        cache = self.cache
        shared = cache.block_table[0, : self.hit // cache.page_tokens].long()
        cache._make_room([k.shape[0]])
        before = cache.pool.storage[shared].clone()
        cache._append(k, v, None, "pack")
        cache.pool.storage[shared] = before
        start = torch.tensor([0, k.shape[0]], dtype=torch.int32)
        layout = (cache.format, WINDOW, SINKS)
        options = (self.shape[2] ** -0.5, softcap, 0, None, True)
        out, _ = ops.attend_over(cache._arrays(), q, k, v, start, *layout, *options)
        cache._add_lengths(cache._append(k, v, None, "remember"))
        return out
