# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Attention on a CUDA device: torch's flash and cuDNN kernels, FlashInfer, ours, and two bounds.

All kernels of a case run in one process on the same K and V, interleaved. Each call is a replay of
a captured CUDA graph (as serving engines launch it; eager where a kernel cannot be captured), after
a read of more bytes than the L2 cache holds, as the weights of a model are read between two calls.
After a write it would be full of lines that must go to memory in the time of the next call, 8 to
10 us on an H100: `dirty` measures that. Times are medians of event pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import _core, ops
from .attention import Case

FLUSH_BYTES = 256 << 20
WINDOW, SINKS, PAGE_TOKENS = 32, 4, 128
FLASH = "torch flash"


@dataclass(frozen=True)
class CudaCase:
    """`queries` new tokens for each sequence of `lengths` cached tokens."""

    q_heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    queries: int = 1

    @property
    def shape(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}/{self.head_dim}"

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def ragged(self) -> bool:
        return len(set(self.lengths)) > 1

    @property
    def name(self) -> str:
        low, high = min(self.lengths), max(self.lengths)
        tokens = f"{low} to {high}" if self.ragged else str(high)
        return f"{self.shape}, {self.batch} x {tokens} tokens, {self.queries} queries"


@dataclass
class CudaRow:
    """One kernel's result.

    `gigabytes_per_s`: cache bytes over time. `speedup`: against the fastest torch flash row of the
    case. `bound_fraction`: time to only read the same bytes over the kernel's time. `flush`: how
    other data came into the L2 cache before each call, "read" or "write".
    """

    kernel: str
    shape: str
    batch: int
    tokens: int
    ragged: bool
    queries: int
    us: float
    cache_bytes: int
    gigabytes_per_s: float
    speedup: float
    bound_fraction: float
    flush: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Kernel:
    name: str
    cache_bytes: int
    call: Callable[[], object]
    bound: str | None = None  # name of the row that reads the same bytes


def default_cases() -> list[CudaCase]:
    """Decode over context, batch, GQA ratio and head_dim, a ragged batch, and chunked prefill."""
    sizes = [(1, 1), (1, 2), (1, 8), (1, 32), (1, 128), (8, 4), (8, 8), (8, 32), (8, 128)]
    sizes += [(16, 16), (48, 4), (64, 8), (256, 2)]
    cases = [CudaCase(32, 8, 128, (tokens << 10,) * batch) for batch, tokens in sizes]
    ragged = (512, 1000, 2048, 3500, 4096, 7000, 9000, 16384, 20000, 32768, 50000, 65536, 131072)
    cases.append(CudaCase(32, 8, 128, ragged))
    for q_heads, kv_heads, head_dim in [(8, 8, 128), (64, 8, 128), (32, 8, 64), (16, 4, 256)]:
        cases.append(CudaCase(q_heads, kv_heads, head_dim, (32 << 10,) * 8))
    cases += [CudaCase(32, 8, 128, (32 << 10,), queries) for queries in (16, 128, 512, 2048)]
    return cases


def parse_case(shape: str, batch: int, tokens: int, queries: int) -> CudaCase:
    """A case of equal lengths; ValueError for a shape that is not q_heads/kv_heads/head_dim."""
    return CudaCase(*Case.parse_shape(shape), (tokens,) * batch, queries)


class Problem:
    """K and V of a case in 16 bits, flat ``[tokens, kv_heads, head_dim]``, and one step's rows."""

    def __init__(self, case: CudaCase, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        options = {"dtype": dtype, "device": "cuda"}
        # The step's own tokens stand after the cached ones: flash attention wants them there.
        total = sum(case.lengths) + case.batch * case.queries
        rows = (total, case.kv_heads, case.head_dim)
        self.k, self.v = torch.randn(rows, **options), torch.randn(rows, **options)
        tokens = case.batch * case.queries
        self.q = torch.randn((tokens, case.q_heads, case.head_dim), **options)
        self.ends = _starts([length + case.queries for length in case.lengths])
        self.query_start = _starts([case.queries] * case.batch)
        new = [slice(end - case.queries, end) for end in self.ends.tolist()[1:]]
        self.k_new = torch.cat([self.k[rows] for rows in new])
        self.v_new = torch.cat([self.v[rows] for rows in new])
        self.scale = case.head_dim**-0.5

    @property
    def dense_bytes(self) -> int:
        case = self.case
        return 2 * self.dtype.itemsize * sum(case.lengths) * case.kv_heads * case.head_dim

    def of(self, rows: Tensor, b: int) -> Tensor:
        return rows[int(self.ends[b]) : int(self.ends[b + 1])]

    def stacked(self, rows: Tensor) -> Tensor:
        """``[batch, tokens, heads, head_dim]`` of equal lengths."""
        return rows.view(self.case.batch, -1, *rows.shape[1:])


def _starts(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    # The kernel below SDPA, whose is_causal would align the queries with the first keys.
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scale
    )
    return out[0]


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)


def _dense_kernels(problem: Problem) -> Iterator[Kernel]:
    case, scale, nbytes = problem.case, problem.scale, problem.dense_bytes
    if case.ragged:
        longest = max(case.lengths) + case.queries
        ends, starts = problem.ends.cuda(), problem.query_start.cuda()
        flash = torch.ops.aten._flash_attention_forward
        yield Kernel(
            f"{FLASH} varlen",
            nbytes,
            lambda: flash(
                *(problem.q, problem.k, problem.v, starts, ends, case.queries, longest),
                *(0.0, True, False),
                scale=scale,
            ),
        )
        q = problem.stacked(problem.q)
        parts = [
            (q[b : b + 1], problem.of(problem.k, b)[None], problem.of(problem.v, b)[None])
            for b in range(case.batch)
        ]
        yield Kernel(
            f"{FLASH} one by one", nbytes, lambda: [_flash(*part, scale) for part in parts]
        )
        return
    q, k, v = (problem.stacked(x) for x in (problem.q, problem.k, problem.v))
    if case.queries == 1:
        for name, backend in (
            (FLASH, SDPBackend.FLASH_ATTENTION),
            ("torch cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            yield Kernel(name, nbytes, partial(_sdpa, backend, q, k, v, scale))
    else:
        yield Kernel(FLASH, nbytes, partial(_flash, q, k, v, scale))


def _flashinfer_kernels(problem: Problem) -> Iterator[Kernel]:
    """The batch decode of FlashInfer on pages of 16 tokens, where the package is installed."""
    case, page = problem.case, 16
    if case.queries > 1:
        return
    try:
        import flashinfer
    except ImportError:
        return
    counts = [-(-(length + 1) // page) for length in case.lengths]
    pages = sum(counts)
    shape = (pages, page, case.kv_heads, case.head_dim)
    k = torch.randn(shape, dtype=problem.dtype, device="cuda")
    v = torch.randn(shape, dtype=problem.dtype, device="cuda")
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        _starts(counts),
        torch.randperm(pages, dtype=torch.int32, device="cuda"),
        torch.tensor([length % page + 1 for length in case.lengths], dtype=torch.int32),
        case.q_heads,
        case.kv_heads,
        case.head_dim,
        page,
        q_data_type=problem.dtype,
        kv_data_type=problem.dtype,
    )
    yield Kernel("flashinfer", problem.dense_bytes, lambda: wrapper.run(problem.q, (k, v)))


class PackedProblem:
    """The same tokens packed: the arrays of `oscar_kv.ops`, on the device."""

    def __init__(self, problem: Problem, fmt: str) -> None:
        case, options = problem.case, {"dtype": torch.int32, "device": "cuda"}
        self.problem, self.format = problem, fmt
        pages = [-(-length // PAGE_TOKENS) for length in case.lengths]
        tile_bytes = _core.tile_bytes(case.head_dim, fmt)
        self.pages = torch.zeros(
            (sum(pages), case.kv_heads, PAGE_TOKENS // 32, tile_bytes),
            dtype=torch.uint8,
            device="cuda",
        )
        ring = _core.ring_tokens(WINDOW)
        self.exact = torch.zeros(
            (case.batch, 2, case.kv_heads, ring + SINKS, case.head_dim),
            dtype=problem.dtype,
            device="cuda",
        )
        # Pages in random order, as an engine hands them out over time.
        order = torch.randperm(sum(pages), dtype=torch.int32)
        self.block_table = torch.zeros((case.batch, max(pages)), dtype=torch.int32)
        for b, mine in enumerate(order.split(pages)):
            self.block_table[b, : len(mine)] = mine
        self.block_table = self.block_table.cuda()
        self.slot = torch.arange(case.batch, **options)
        self.seq_len = torch.zeros(case.batch, **options)
        start = _starts(list(case.lengths)).cuda()
        k, v = (
            torch.cat([problem.of(rows, b)[: case.lengths[b]] for b in range(case.batch)])
            for rows in (problem.k, problem.v)
        )
        ops.append(*self.arrays, k, v, start, fmt, WINDOW, SINKS, "both")
        self.seq_len.copy_(torch.tensor(case.lengths, dtype=torch.int32))
        self.query_start = problem.query_start.cuda()
        self.handed_over = _core.CacheArrays(*self.arrays)
        self.plan = self.new_plan()

    def new_plan(self) -> _core.AttendPlan:
        """What the layers of a step share, as FlashInfer's plan: made once, outside of attend."""
        problem, case = self.problem, self.problem.case
        return ops.plan_attend(
            *(self.handed_over, self.query_start, problem.q.shape[0], case.q_heads),
            *(self.format, WINDOW, SINKS),
            max_query_len=case.queries,
        )

    @property
    def arrays(self) -> tuple[Tensor | None, ...]:
        return (self.pages, self.exact, self.block_table, self.slot, self.seq_len, None, None)

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles that a step reads (whole pages only where they are full)."""
        tiles = sum(length // 32 for length in self.problem.case.lengths)
        return tiles * self.pages[0, :, 0].nbytes

    def attend(self) -> Tensor:
        problem = self.problem
        out: Tensor = ops.attend_over(
            *(self.handed_over, problem.q, problem.k_new, problem.v_new, self.query_start),
            *(self.format, WINDOW, SINKS, problem.scale, 0.0, 0, None, False),
            max_query_len=problem.case.queries,
            plan=self.plan,
        )[0]
        return out


def _packed_kernels(problem: Problem, fmt: str) -> Iterator[Kernel]:
    packed = PackedProblem(problem, fmt)
    if not bool(torch.isfinite(packed.attend()).all()):
        raise RuntimeError(f"attend on {fmt} returned a value that is not finite")
    read = f"read {fmt} bytes"
    target = torch.empty_like(packed.pages)
    total = torch.zeros(1, dtype=torch.int64, device="cuda")
    yield Kernel(f"oscar {fmt}", packed.nbytes, packed.attend, read)
    if problem.case.queries == 1:
        yield Kernel(f"plan {fmt}, once a step", 0, packed.new_plan)
    yield Kernel(read, packed.nbytes, partial(ops.cuda_read_bytes, packed.pages, total), read)
    yield Kernel(f"copy {fmt} bytes", packed.nbytes, lambda: target.copy_(packed.pages), read)


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of `call`, or `call` itself where it cannot be captured."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def _measure(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    dirty: bool,
    on_step: Callable[[], None] | None,
) -> dict[str, float]:
    """Median microseconds of each call, interleaved, with a cold L2 cache."""
    other = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for step in range(repeats + 3):
        events = []
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if dirty:
                other.fill_(step)
            else:
                other.sum()
            start.record()
            call()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events:
            if step >= 3:
                times[name].append(1e3 * start.elapsed_time(end))
        if on_step is not None:
            on_step()
    return {name: statistics.median(values) for name, values in times.items()}


def run_cuda(
    case: CudaCase,
    formats: list[str],
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 30,
    dirty: bool = False,
    on_step: Callable[[], None] | None = None,
) -> list[CudaRow]:
    """Times every kernel of one case; one CudaRow a kernel. A kernel that refuses is left out."""
    torch.manual_seed(0)
    problem = Problem(case, dtype)
    kernels = [*_dense_kernels(problem), *_flashinfer_kernels(problem)]
    for fmt in formats:
        kernels += _packed_kernels(problem, fmt)
    calls: dict[str, Callable[[], object]] = {}
    for kernel in kernels:
        try:
            calls[kernel.name] = _captured(kernel.call)
        except RuntimeError:
            if kernel.name.startswith("oscar"):
                raise
    medians = _measure(calls, repeats, dirty, on_step)
    flash = min(us for name, us in medians.items() if name.startswith(FLASH))
    return [
        CudaRow(
            kernel=kernel.name,
            shape=case.shape,
            batch=case.batch,
            tokens=max(case.lengths),
            ragged=case.ragged,
            queries=case.queries,
            us=round(medians[kernel.name], 2),
            cache_bytes=kernel.cache_bytes,
            gigabytes_per_s=round(kernel.cache_bytes / medians[kernel.name] / 1e3, 1),
            speedup=round(flash / medians[kernel.name], 3),
            bound_fraction=round(medians[kernel.bound or kernel.name] / medians[kernel.name], 3),
            flush="write" if dirty else "read",
        )
        for kernel in kernels
        if kernel.name in medians
    ]
