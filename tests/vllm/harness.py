# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""One attention layer as vLLM drives it, without vLLM's engine: blocks, tables, hits, preemption.

`FakeEngine` hands out blocks of one pool as vLLM does (pages, and `exact_blocks` ring groups of one
block a request), frees them, finds prefixes of full blocks again, and calls the real metadata
builders and the real layer with random ragged batches. What they must compute: engine_oracle.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import oscar_kv.vllm.attention as attention
import torch
from engine_oracle import Oracle
from oscar_kv.vllm.ring import ExactRing
from oscar_kv.vllm.spec import REPLAY
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode


def fake_config(block_tokens, dtype=torch.bfloat16, **changes):
    """The attributes of a VllmConfig that the plugin reads."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            block_size=block_tokens,
            user_specified_block_size=True,
            kv_cache_dtype_skip_layers=[],
            kv_offloading_size=None,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, max_num_seqs=8),
        model_config=SimpleNamespace(dtype=dtype, is_hybrid=False, max_model_len=4096),
        compilation_config=SimpleNamespace(static_forward_context={}),
        device_config=SimpleNamespace(device_type="cpu"),
        kv_transfer_config=None,
        speculative_config=None,
        additional_config={},
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return config


class FakeLayer:
    """What the plugin touches of vLLM's Attention layer."""

    def __init__(self, impl, name, geometry):
        self.impl, self.layer_name, self.geometry = impl, name, geometry
        self.attn_backend = None

    def get_attn_backend(self):
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config):
        return FullAttentionSpec(
            block_size=self.geometry.block_tokens,
            num_kv_heads=self.geometry.kv_heads,
            head_size=self.geometry.head_dim,
            head_size_v=self.geometry.head_dim,
            dtype=torch.uint8,
            kv_quant_mode=KVQuantMode.CUSTOM,
        )


def make_impl(monkeypatch, config, impl_class, shape, dtype_name, **arguments):
    """An implementation as Attention.__init__ makes one; shape (heads, kv_heads, head_dim)."""
    monkeypatch.setattr(attention, "get_current_vllm_config", lambda: config)
    heads, kv_heads, head_dim = shape
    return impl_class(
        heads, head_dim, head_dim**-0.5, kv_heads, kv_cache_dtype=dtype_name, **arguments
    )


@dataclass
class Request:
    """tokens: ids, `prompt` of them known at its start; done: computed; rings: a block a part."""

    tokens: tuple[int, ...]
    prompt: int = 0
    done: int = 0
    hit: int = 0
    blocks: list[int] = field(default_factory=list)
    rings: list[int] = field(default_factory=list)
    oracle: Oracle | None = None


class FakeEngine:
    """A pool of `num_blocks` blocks, garbage at first, and one layer on it."""

    def __init__(self, monkeypatch, impl_class, shape, dtype_name, block_tokens, num_blocks, seed):
        self.device = torch.device("cuda" if "Cuda" in impl_class.__name__ else "cpu")
        self.random = random.Random(seed)
        self.shape, self.block_tokens = shape, block_tokens
        self.config = fake_config(block_tokens)
        self.config.device_config.device_type = self.device.type
        self.impl = make_impl(monkeypatch, self.config, impl_class, shape, dtype_name)
        self.geometry = self.impl.geometry
        layers = self.config.compilation_config.static_forward_context
        self.layer = layers["model.layers.0.attn"] = FakeLayer(
            self.impl, "model.layers.0.attn", self.geometry
        )
        self.impl.process_weights_after_loading(torch.bfloat16)
        self.rings = [x for x in layers.values() if isinstance(x, ExactRing)]
        content = (self.geometry.kv_heads, block_tokens, self.geometry.tile_bytes // 32)
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.randint(
            0, 256, (num_blocks, *content), dtype=torch.uint8, generator=generator
        ).to(self.device)
        self.layer.kv_cache = self.pool
        self.builders = [self._builder(self.layer, "model.layers.0.attn")]
        self.builders += [
            self._builder(ring, f"model.layers.0.attn.oscar_ring_{'abcd'[ring.part]}")
            for ring in self.rings
        ]
        self.free = list(range(1, num_blocks))  # block 0 is vLLM's null block
        self.cached = {}  # tokens of whole blocks from the start -> block
        self.running = []
        self.hits = 0
        self.runner = 1  # of vLLM's model runners; what V2 alone tells a builder
        self.kept = {}
        self.starting = []

    def _builder(self, layer, name):
        spec = layer.get_kv_cache_spec(self.config)
        builder = self.layer.get_attn_backend().get_builder_cls()
        return builder(spec, [name], self.config, self.device)

    # -- scheduler -----------------------------------------------------------------------------

    def _take(self):
        # Most recently freed first, so that stale contents come back where they hurt.
        block = self.free.pop(self.random.randrange(max(0, len(self.free) - 3), len(self.free)))
        self.cached = {key: b for key, b in self.cached.items() if b != block}
        return block

    def add(self, tokens):
        """Starts a request; its prefix of whole blocks is looked up as vLLM does."""
        request = Request(tuple(tokens))
        while (len(request.blocks) + 1) * self.block_tokens < len(tokens):
            key = request.tokens[: (len(request.blocks) + 1) * self.block_tokens]
            if key not in self.cached:
                break
            block = self.cached[key]
            if block in self.free:
                self.free.remove(block)
            request.blocks.append(block)
        # As vLLM's scheduler does for a group with prefix_replay_tokens.
        request.hit = len(request.blocks) * self.block_tokens
        request.done = max(request.hit - REPLAY, 0)
        self.hits += request.hit > 0
        request.prompt = self.random.randint(request.hit + 1, len(tokens))
        request.rings = [self._take() for _ in self.rings]
        hit_and_done = (request.hit, request.done)
        request.oracle = Oracle(self.shape, self.geometry.format, request.tokens, *hit_and_done)
        self.running.append(request)
        return request

    def finish(self, request):
        """Frees the blocks of a request; whole pages can be found again until they are reused."""
        self.running.remove(request)
        held = {block for other in self.running for block in other.blocks}
        freed = request.rings + [b for b in request.blocks if b not in held]
        self.random.shuffle(freed)
        self.free += freed

    def room(self, requests, counts):
        """Whether pages for these tokens are free."""
        needed = sum(
            -(-(r.done + n) // self.block_tokens) - len(r.blocks)
            for r, n in zip(requests, counts, strict=True)
        )
        return needed <= len(self.free) - 2

    # -- one step ------------------------------------------------------------------------------

    def capture(self, requests):
        """A CUDA graph of a step of one token each, on tensors that every step keeps."""
        heads, kv_heads, head_dim = self.shape
        shapes = [(len(requests), n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
        q, k, v, out = (
            torch.zeros(shape, dtype=torch.bfloat16, device=self.device) for shape in shapes
        )
        metadata = self._metadata(requests, [1] * len(requests))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.impl.forward(self.layer, q, k, v, self.pool, metadata, out)
        return graph, (q, k, v), out

    def schedule(self, request, count):
        """Blocks for its next tokens; like vLLM, whole ones are found from now on."""
        while len(request.blocks) * self.block_tokens < request.done + count:
            request.blocks.append(self._take())
        for i in range((request.done + count) // self.block_tokens):
            key = request.tokens[: (i + 1) * self.block_tokens]
            self.cached.setdefault(key, request.blocks[i])

    def step(self, requests, counts, graph=None):
        """Runs the layer; returns (output, what the oracle says), lists of [count, heads, dim]."""
        for request, count in zip(requests, counts, strict=True):
            self.schedule(request, count)
        rows = [r.oracle.rows(r.done, r.done + n) for r, n in zip(requests, counts, strict=True)]
        q, k, v = (torch.cat([x[i] for x in rows]) for i in range(3))
        metadata = self._metadata(requests, counts)
        if graph is None:
            out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=self.device)
            arguments = (q.to(self.device), k.to(self.device), v.to(self.device), self.pool)
            self.impl.forward(self.layer, *arguments, metadata, out)
        else:
            captured, inputs, out = graph
            for given, x in zip(inputs, (q, k, v), strict=True):
                given.copy_(x)
            captured.replay()
        expected = [r.oracle.step(*x) for r, x in zip(requests, rows, strict=True)]
        for request, count in zip(requests, counts, strict=True):
            request.done += count
        return list(out.cpu().split(counts)), expected

    def _metadata(self, requests, counts):
        ends = [r.done + n for r, n in zip(requests, counts, strict=True)]
        start = [0]
        for count in counts:
            start.append(start[-1] + count)
        columns = 4096 // self.block_tokens
        tables = [[r.blocks + [0] * (columns - len(r.blocks)) for r in requests]]
        tables += [[[r.rings[part]] for r in requests] for part in range(len(self.rings))]
        order = list(range(len(tables)))
        self.random.shuffle(order)
        built = {}
        for group in order:
            common = CommonAttentionMetadata(
                query_start_loc=self._kept("start", start),
                query_start_loc_cpu=torch.tensor(start, dtype=torch.int32),
                seq_lens=self._kept("ends", ends),
                num_reqs=len(requests),
                num_actual_tokens=start[-1],
                max_query_len=max(counts),
                max_seq_len=max(ends),
                block_table_tensor=self._kept(group, tables[group]),
                slot_mapping=torch.zeros(start[-1], dtype=torch.int64),
                seq_lens_cpu_upper_bound=torch.tensor(ends, dtype=torch.int32),
                is_prefilling=torch.tensor([r.done < r.prompt for r in requests]),
                req_idx=np.arange(len(requests)) if self.runner == 2 else None,
            )
            built[group] = self.builders[group].build(0, common)
        self.starting = built[0].starting.tolist()
        return built[0]

    def _kept(self, name, values):
        """int32 on the device, at one address for each shape, as vLLM's own are."""
        values = torch.tensor(values, dtype=torch.int32)
        key = (name, values.shape)
        if key not in self.kept:
            self.kept[key] = torch.empty_like(values, device=self.device)
        return self.kept[key].copy_(values)
