# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar bench`: decode attention against torch and reading, packing against copying."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..bench.append import run_append
from ..bench.attention import Case, Row, default_backends, run
from .bench_decode import decode
from .common import InputError, PackedFormat, guarded, progress_bar

if TYPE_CHECKING:
    from ..bench.cuda import CudaRow

bench = typer.Typer(no_args_is_help=True, help="Measure kernels on this machine.")


@bench.callback()
def group() -> None:
    """Measure kernels on this machine."""


def attention(
    shape: Annotated[
        list[str] | None, typer.Option(help="q_heads/kv_heads/head_dim; may be repeated.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences; repeatable.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=32, help="Cached tokens a sequence; repeatable.")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Threads; repeatable.")] = None,
    format: Annotated[list[PackedFormat] | None, typer.Option(help="Formats; repeatable.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Our instruction sets; without it the vector ones.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each kernel.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG: time over tokens.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder: append the rows to a JSONL file of this CPU.")
    ] = None,
) -> None:
    """Time one decode step of attention: torch SDPA, ours, and reading the same bytes.

    All kernels of a case run interleaved in one process with cold caches; figures are medians.
    `speedup` is against torch's bf16 SDPA with the query heads folded into the query length, the
    fastest 16-bit call; `of bound` is the time to read the kernel's bytes over its time.
    """
    cases = [
        Case(*Case.parse_shape(one_shape), one_batch, one_tokens, one_threads)
        for one_shape in shape or ["32/8/128"]
        for one_batch in batch or [1]
        for one_tokens in tokens or [8192]
        for one_threads in threads or sorted({1, os.cpu_count() or 1})
    ]
    if any(case.tokens % 32 for case in cases):
        raise InputError("--tokens must be a multiple of 32")
    formats = [one.value for one in format or [PackedFormat.K2V2]]
    rows: list[Row] = []
    console = Console()
    for case in cases:
        name = f"{case.shape}, batch {case.batch}, {case.tokens} tokens, {case.threads} thread(s)"
        with progress_bar(name, repeats + 1) as advance:
            found = run(case, formats, backend, repeats, advance)
        rows += found
        if not as_json:
            console.print(_table(name, found))
    if save is not None:
        from ..bench.results import save_results

        save_results(rows, save)
    if plot is not None:
        from ..bench.plot import save_plot

        save_plot(rows, plot)
    if as_json:
        print(json.dumps([row.as_dict() for row in rows]))


def _table(title: str, rows: Sequence[Row | CudaRow]) -> Table:
    table = Table(title=title)
    table.add_column("kernel")
    for column in ("us", "cache MB", "speedup", "of bound"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.kernel,
            f"{row.us:.1f}",
            f"{row.cache_bytes / 1e6:.2f}",
            f"{row.speedup:.2f}",
            f"{row.bound_fraction:.2f}",
        )
    return table


def append(
    shape: Annotated[str, typer.Option(help="q_heads/kv_heads/head_dim.")] = "32/8/128",
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of the prompt.")] = 8192,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    format: Annotated[list[PackedFormat] | None, typer.Option(help="Formats; repeatable.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Our instruction sets; without it the vector ones.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows.")] = False,
) -> None:
    """Time the packing of a 16-bit prompt into an empty cache, against copying it."""
    _, kv_heads, head_dim = Case.parse_shape(shape)
    formats = [one.value for one in format or [PackedFormat.K2V2]]
    backends = backend or default_backends()
    rows = run_append(kv_heads, head_dim, tokens, threads, formats, backends, repeats)
    if as_json:
        print(json.dumps([row.as_dict() for row in rows]))
        return
    table = Table(title=f"{tokens} tokens, {kv_heads} KV heads of {head_dim}, {threads} thread(s)")
    table.add_column("kernel")
    for column in ("us", "GB/s of 16-bit input", "of copy"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.kernel, f"{row.us:.1f}", f"{row.gigabytes_per_s:.2f}", f"{row.copy_fraction:.3f}"
        )
    Console().print(table)


def cuda(
    shape: Annotated[
        list[str] | None, typer.Option(help="q_heads/kv_heads/head_dim; without it the full table.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences; repeatable.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=32, help="Cached tokens a sequence; repeatable.")
    ] = None,
    queries: Annotated[
        list[int] | None, typer.Option(min=1, help="New tokens a sequence; repeatable.")
    ] = None,
    format: Annotated[list[PackedFormat] | None, typer.Option(help="Formats; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each kernel.")] = 30,
    dirty: Annotated[
        bool, typer.Option("--dirty", help="Fill the L2 cache by a write before each call.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write a PNG: time over tokens, speedup over batch.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder: append the rows to a JSONL file of this GPU.")
    ] = None,
) -> None:
    """Time attention on this GPU: torch flash and cuDNN, FlashInfer, ours, reading, copying.

    All kernels of a case run interleaved in one process with a cold L2 cache; figures are medians.
    `speedup` is against torch's flash attention in bf16; `of bound` is the time to only read the
    kernel's bytes over its time. Without --shape, --batch, --tokens and --queries: a table over
    contexts, batches, GQA ratios, head_dims, a ragged batch and prompt chunks.

    Before each call other data is read into the L2 cache, as a model reads its weights; with
    --dirty it is written, and a call waits for memory to take it back.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError("bench cuda needs a CUDA device, torch sees none")
    from ..bench.cuda import default_cases, parse_case, run_cuda

    cases = default_cases()
    if shape or batch or tokens or queries:
        cases = [
            parse_case(one_shape, one_batch, one_tokens, one_queries)
            for one_shape in shape or ["32/8/128"]
            for one_batch in batch or [1]
            for one_tokens in tokens or [32768]
            for one_queries in queries or [1]
        ]
    formats = [one.value for one in format or [PackedFormat.K2V2]]
    rows = []
    console = Console()
    for case in cases:
        with progress_bar(case.name, repeats + 3) as advance:
            found = run_cuda(case, formats, repeats=repeats, dirty=dirty, on_step=advance)
        rows += found
        if not as_json:
            console.print(_table(case.name, found))
    if save is not None:
        from ..bench.results import save_results

        save_results(rows, save, torch.cuda.get_device_name())
    if plot is not None:
        from ..bench.plot import save_cuda_plot

        save_cuda_plot(rows, plot)
    if as_json:
        print(json.dumps([row.as_dict() for row in rows]))


bench.command()(guarded(attention))
bench.command()(guarded(cuda))
bench.command()(guarded(append))
bench.command()(guarded(decode))
