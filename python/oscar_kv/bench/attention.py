# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Decode attention on the CPU: torch SDPA, ours, and the time to read the same bytes.

All kernels of a case run in one process, interleaved, each on copies of its cache that together
exceed the last-level cache, so every call finds its bytes in memory. Times are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import _core, available_backends, set_backend
from ..cache import PagedCache

COLD_BYTES = 256 << 20
BASELINE = "torch bf16 folded"


@dataclass(frozen=True)
class Case:
    """One decode step: `batch` sequences of `tokens` cached tokens, one query token each."""

    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    tokens: int
    threads: int

    @property
    def shape(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}/{self.head_dim}"

    @staticmethod
    def parse_shape(text: str) -> tuple[int, int, int]:
        """q_heads/kv_heads/head_dim, for example 32/8/128; ValueError otherwise."""
        parts = text.split("/")
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(
                f"shape is '{text}', must be q_heads/kv_heads/head_dim such as 32/8/128"
            )
        q_heads, kv_heads, head_dim = map(int, parts)
        if q_heads % kv_heads:
            raise ValueError(f"shape is '{text}': q_heads must be a multiple of kv_heads")
        return q_heads, kv_heads, head_dim


@dataclass
class Row:
    """One kernel's result; `speedup` against the folded bf16 row, `bound_fraction` = read / us."""

    kernel: str
    shape: str
    batch: int
    tokens: int
    threads: int
    us: float
    cache_bytes: int
    speedup: float
    bound_fraction: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Kernel:
    name: str
    cache_bytes: int
    copies: int
    call: Callable[[int], object]  # argument: which copy
    bound: str  # name of the row that reads the same bytes


def _copies(nbytes: int) -> int:
    return max(1, -(-COLD_BYTES // nbytes))


def _dense_kernels(case: Case, dtype: torch.dtype, label: str) -> Iterator[Kernel]:
    shape = (case.batch, case.kv_heads, case.tokens, case.head_dim)
    nbytes = 2 * dtype.itemsize * case.batch * case.kv_heads * case.tokens * case.head_dim
    count = _copies(nbytes)
    k, v = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    copies = [(k, v)] + [(k.clone(), v.clone()) for _ in range(count - 1)]
    q = torch.randn((case.batch, case.q_heads, 1, case.head_dim), dtype=dtype)
    folded = q.view(case.batch, case.kv_heads, case.q_heads // case.kv_heads, case.head_dim)

    def attend(query: Tensor, copy: int, **options: bool) -> Tensor:
        return scaled_dot_product_attention(query, *copies[copy], **options)

    def read(copy: int) -> int:
        return _core.read_bytes(copies[copy][0]) + _core.read_bytes(copies[copy][1])

    bound = f"read {label} bytes"
    yield Kernel(
        f"torch {label} enable_gqa", nbytes, count, partial(attend, q, enable_gqa=True), bound
    )
    yield Kernel(f"torch {label} folded", nbytes, count, partial(attend, folded), bound)
    yield Kernel(bound, nbytes, count, read, bound)


def _packed_kernels(case: Case, fmt: str, backends: list[str]) -> Iterator[Kernel]:
    cache = PagedCache(case.batch, case.kv_heads, case.head_dim, torch.bfloat16, format=fmt)
    chunk = 4096
    for start in range(0, case.tokens, chunk):
        tokens = case.batch * min(chunk, case.tokens - start)
        new = torch.randn((2, tokens, case.kv_heads, case.head_dim), dtype=torch.bfloat16)
        cache.append(new[0], new[1])
    nbytes = case.batch * (case.tokens // 32) * cache.pool.storage[0, :, 0].nbytes
    count = _copies(nbytes)
    copies = [cache] + [deepcopy(cache) for _ in range(count - 1)]
    q = torch.randn((case.batch, case.q_heads, case.head_dim), dtype=torch.bfloat16)
    new = torch.randn((2, case.batch, case.kv_heads, case.head_dim), dtype=torch.bfloat16)

    def attend(backend: str, copy: int) -> object:
        set_backend(backend)
        return copies[copy].attend(q, new[0], new[1], scale=case.head_dim**-0.5)

    def read(copy: int) -> int:
        return _core.read_bytes(copies[copy].pool.storage)

    bound = f"read {fmt} bytes"
    for backend in backends:
        yield Kernel(f"oscar {fmt} {backend}", nbytes, count, partial(attend, backend), bound)
    yield Kernel(bound, nbytes, count, read, bound)


def default_backends() -> list[str]:
    """The vector backends of this machine (the scalar ones are far too slow to interleave)."""
    backends = available_backends()
    return [name for name in backends if name not in ("reference", "scalar")] or backends[-1:]


def run(
    case: Case,
    formats: list[str],
    backends: list[str] | None = None,
    repeats: int = 30,
    on_step: Callable[[], None] | None = None,
) -> list[Row]:
    """Times every kernel of one case `repeats` times, interleaved; one Row a kernel."""
    torch.manual_seed(0)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    kernels = list(_dense_kernels(case, torch.bfloat16, "bf16"))
    kernels += _dense_kernels(case, torch.float32, "fp32")
    for fmt in formats:
        kernels += _packed_kernels(case, fmt, backends or default_backends())
    times: dict[str, list[float]] = {kernel.name: [] for kernel in kernels}
    try:
        for step in range(repeats + 1):  # the first round warms code and threads, not caches
            for kernel in kernels:
                start = time.perf_counter()
                kernel.call(step % kernel.copies)
                if step > 0:
                    times[kernel.name].append(time.perf_counter() - start)
            if on_step is not None:
                on_step()
    finally:
        set_backend("auto")
        torch.set_num_threads(threads_before)
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    return [
        Row(
            kernel.name,
            case.shape,
            case.batch,
            case.tokens,
            case.threads,
            round(medians[kernel.name], 1),
            kernel.cache_bytes,
            round(medians[BASELINE] / medians[kernel.name], 3),
            round(medians[kernel.bound] / medians[kernel.name], 3),
        )
        for kernel in kernels
    ]
