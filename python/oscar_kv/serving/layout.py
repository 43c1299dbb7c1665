# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Names of the formats, and the numbers that a cache has in every engine."""

from __future__ import annotations

import torch

from .. import _core
from ..cache import TILE_TOKENS

PREFIX = "oscar_"
DTYPES = tuple(PREFIX + name for name in _core.formats())
WINDOW = 32  # newest tokens read exactly, on top of the open tile
SINKS = 4


def format_of(dtype_name: str | None) -> str | None:
    """The format that a name of `DTYPES` means, None where it is not one of ours."""
    if dtype_name in DTYPES:
        return dtype_name.removeprefix(PREFIX)
    return None


def token_bytes(head_dim: int, format: str) -> int:
    """Bytes of one token and KV head; NotImplementedError for a head_dim without a format."""
    return int(_core.tile_bytes(head_dim, format)) // TILE_TOKENS


def exact_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """dtype of the exact copies: that of a 16-bit model, bfloat16 for float32."""
    return torch.bfloat16 if model_dtype == torch.float32 else model_dtype
