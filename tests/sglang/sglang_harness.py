# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The backend as SGLang's model runner drives it, without a model: rows, pages, hits, retraction.

`FakeRunner` keeps what the plugin reads of SGLang's pools (rows of token indices, the counter of
how often a row was handed out, pages of one allocator), finds prefixes of whole pages again as the
radix cache does, and calls the real backend with ragged batches. What they must compute:
engine_oracle.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import oscar_kv.sglang.backend as backend
import torch
from engine_oracle import Oracle
from oscar_kv.sglang.pool import OscarPool, PoolShape
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

FIRST_LAYER = 3  # as on a later stage of a pipeline: the pool counts from here


@dataclass
class Request:
    """tokens: ids; row: of SGLang's table; done: computed; pages: its own and shared ones."""

    tokens: tuple[int, ...]
    row: int
    done: int = 0
    pages: list[int] = field(default_factory=list)
    oracle: Oracle | None = None


class FakeRunner:
    """One layer over `num_pages` pages, all full of garbage at first."""

    def __init__(
        self, monkeypatch, shape, format="k2v2", page=128, num_pages=40, rows=6, seed=0, softcap=0.0
    ):
        self.random = random.Random(seed)
        self.shape, self.format, self.page, self.softcap = shape, format, page, softcap
        heads, kv_heads, head_dim = shape
        pool_shape = PoolShape(format, 1, kv_heads, head_dim, page, torch.bfloat16)
        self.token_to_kv_pool = OscarPool(
            pool_shape,
            tokens=num_pages * page,
            device="cpu",
            enable_memory_saver=False,
            start_layer=FIRST_LAYER,
            end_layer=FIRST_LAYER,
        )
        generator = torch.Generator().manual_seed(seed)
        self.pages = self.token_to_kv_pool.pages[0]
        self.pages.random_(0, 256, generator=generator)
        self.req_to_token_pool = SimpleNamespace(
            req_to_token=torch.zeros((rows + 1, 2048), dtype=torch.int32),
            req_generation=torch.zeros(rows + 1, dtype=torch.int64),
        )
        self.layer = RadixAttention(
            heads, head_dim, head_dim**-0.5, kv_heads, FIRST_LAYER, logit_cap=softcap
        )
        self.model = torch.nn.ModuleDict({"attention": self.layer})
        self.model_config = SimpleNamespace(hf_config=None, model_path="none")
        parallel = SimpleNamespace(attn_tp_rank=0, attn_tp_size=1)
        monkeypatch.setattr(backend, "get_parallel", lambda: parallel)
        self.backend = backend.OscarAttnBackend(self, format)
        self.token_to_kv_pool.exact[0].fill_(torch.nan)
        self.free_rows = list(range(1, rows + 1))
        self.free_pages = list(range(1, num_pages + 1))
        self.cached = {}  # tokens of whole pages from the start -> page
        self.running = []
        self.hits = 0

    # -- scheduler -----------------------------------------------------------------------------

    def _take_page(self):
        # Most recently freed first, so that stale contents come back where they hurt.
        page = self.free_pages.pop()
        self.cached = {key: p for key, p in self.cached.items() if p != page}
        return page

    def add(self, tokens):
        """Starts a request; whole pages that are known are not computed again."""
        row = self.free_rows.pop()
        self.req_to_token_pool.req_generation[row] += 1
        request = Request(tuple(tokens), row)
        while (len(request.pages) + 1) * self.page < len(tokens):
            key = request.tokens[: (len(request.pages) + 1) * self.page]
            if key not in self.cached:
                break
            page = self.cached[key]
            if page in self.free_pages:
                self.free_pages.remove(page)
            request.pages.append(page)
        request.done = len(request.pages) * self.page
        self.hits += request.done > 0
        request.oracle = Oracle(self.shape, self.format, request.tokens, request.done, request.done)
        self.running.append(request)
        return request

    def finish(self, request):
        """Frees row and pages; whole pages can be found again until they are used anew."""
        self.running.remove(request)
        held = {page for other in self.running for page in other.pages}
        self.free_rows.append(request.row)
        self.free_pages += [page for page in request.pages if page not in held]

    def room(self, requests, counts):
        """Whether pages for these tokens are free."""
        needed = sum(
            -(-(r.done + n) // self.page) - len(r.pages)
            for r, n in zip(requests, counts, strict=True)
        )
        return needed <= len(self.free_pages) - 2

    # -- one step ------------------------------------------------------------------------------

    def batch(self, requests, counts, mode):
        """The attributes of a ForwardBatch that the plugin reads."""
        for request, count in zip(requests, counts, strict=True):
            end = request.done + count
            while len(request.pages) * self.page < end:
                request.pages.append(self._take_page())
            index = torch.tensor(request.pages)[:, None] * self.page + torch.arange(self.page)
            self.req_to_token_pool.req_to_token[request.row, :end] = index.flatten()[:end].int()
        extend = mode is not ForwardMode.DECODE
        rows = torch.tensor([r.row for r in requests])
        return SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=rows,
            req_pool_indices_cpu=rows.clone() if mode is ForwardMode.EXTEND else None,
            seq_lens=torch.tensor([r.done + n for r, n in zip(requests, counts, strict=True)]),
            extend_seq_lens=torch.tensor(counts, dtype=torch.int32) if extend else None,
            extend_prefix_lens=torch.tensor([r.done for r in requests]) if extend else None,
            extend_seq_lens_cpu=list(counts) if extend else None,
            extend_prefix_lens_cpu=[r.done for r in requests] if extend else None,
        )

    def step(self, requests, counts, mode=None):
        """Runs the layer; returns (output, what the oracle says), lists of [count, heads, dim]."""
        if mode is None:  # a request decodes once its prompt has been computed in part
            started = all(self.backend.slots.knows(r.row) for r in requests)
            decode = started and set(counts) == {1}
            mode = ForwardMode.DECODE if decode else ForwardMode.EXTEND
        rows = [r.oracle.rows(r.done, r.done + n) for r, n in zip(requests, counts, strict=True)]
        q, k, v = (torch.cat([x[i] for x in rows]) for i in range(3))
        batch = self.batch(requests, counts, mode)
        self.backend.init_forward_metadata(batch)
        out = self.backend.forward(q.flatten(1), k, v, self.layer, batch)
        expected = [r.oracle.step(*x, self.softcap) for r, x in zip(requests, rows, strict=True)]
        for request, count in zip(requests, counts, strict=True):
            request.done += count
            for i in range(request.done // self.page):
                key = request.tokens[: (i + 1) * self.page]
                self.cached.setdefault(key, request.pages[i])
        return list(out.view_as(q).split(counts)), expected
