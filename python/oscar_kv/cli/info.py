# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar info`: what is installed and what the formats cost."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import __version__, _core

_HEAD_DIMS = (64, 96, 128, 256)
_TILE_TOKENS = 32


def collect() -> dict[str, Any]:
    """The content of `oscar info --json`."""
    formats: dict[str, Any] = {}
    for name in _core.formats():
        formats[name] = {}
        for head_dim in _HEAD_DIMS:
            token_bytes = _core.tile_bytes(head_dim, name) // _TILE_TOKENS
            formats[name][str(head_dim)] = {
                "bytes_per_token": token_bytes,
                "ratio_to_16bit": round(4 * head_dim / token_bytes, 4),
            }
    return {
        "version": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backends": _core.available_backends(),
        "active_backend": _core.active_backend(),
        "cuda": {"built": _core.cuda_built(), "available": _core.cuda_available()},
        "format_version": _core.format_version,
        "formats": formats,
    }


def _cuda_text(built: bool, available: bool) -> str:
    if not built:
        return "not in this build (OSCAR_CUDA=ON builds them)"
    return "in use for tensors on the GPU" if available else "built; no usable GPU here"


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show version, backends, and the formats' sizes.

    The environment variable OSCAR_BACKEND (one of the backends listed) forces a backend.
    """
    facts = collect()
    if as_json:
        print(json.dumps(facts))
        return
    console = Console(highlight=False)
    console.print(f"oscar-kv {facts['version']}, torch {facts['torch']}")
    console.print(f"backends (slowest first): {', '.join(facts['backends'])}")
    console.print(f"in use: {facts['active_backend']}, {facts['threads']} threads")
    console.print(f"CUDA kernels: {_cuda_text(**facts['cuda'])}")
    table = Table(
        title=f"format {facts['format_version']}: bytes per token and KV head, K and V together "
        "(ratio to 16 bit)"
    )
    table.add_column("format")
    for head_dim in _HEAD_DIMS:
        table.add_column(f"head_dim {head_dim}", justify="right")
    for name, sizes in facts["formats"].items():
        cells = [f"{s['bytes_per_token']} ({s['ratio_to_16bit']:.2f})" for s in sizes.values()]
        table.add_row(name, *cells)
    table.add_row("16 bit", *[f"{4 * head_dim} (1.00)" for head_dim in _HEAD_DIMS])
    console.print(table)
