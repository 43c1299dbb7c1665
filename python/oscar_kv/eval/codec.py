# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What a cache format is to the accuracy laboratory: a function from exact K, V to what is read.

A `Codec` gets the exact K and V of one layer over a whole document and returns what a reader of the
packed copy sees, with masks that say which query reads which copy. One forward pass over the
decoded tokens then simulates decoding token by token: see simulate.py.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_BITS = 16  # bits of an element that is kept exact
_RESIDENT_QUERIES = 256  # residuals fill and flush: the resident bits are a mean over a full cycle


@dataclass
class LayerInput:
    """Exact tensors of one layer over one document, float32, all on one device.

    layer: its index. prompt: tokens 0..prompt-1 are prefilled exactly; statistics (calibration,
    outlier search at prefill) may use those only. q, k, v: after RoPE; k_pre_rope: K before it, cos
    and sin its tables, hidden: the residual stream that enters the layer (before its norm), where
    the engine could record them. seed: of the document, for codecs that draw random numbers.
    """

    layer: int
    prompt: int
    q: Tensor  # [q_heads, tokens, head_dim]
    k: Tensor  # [kv_heads, tokens, head_dim]
    v: Tensor  # [kv_heads, tokens, head_dim]
    k_pre_rope: Tensor | None = None  # [kv_heads, tokens, head_dim]
    hidden: Tensor | None = None  # [tokens, hidden_size]
    cos: Tensor | None = None  # [tokens, rope_dim]
    sin: Tensor | None = None  # [tokens, rope_dim]
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the document."""
        return self.k.shape[1]

    @property
    def queries(self) -> int:
        """Decoded tokens, positions prompt..tokens-1."""
        return self.k.shape[1] - self.prompt


@dataclass
class LayerCodes:
    """What the packed copy of a layer reads as, and who reads it.

    k, v: float32 [kv_heads, tokens, head_dim], in the basis of LayerInput.k (rotations undone),
    with metadata rounded to its storage type. k_packed, v_packed: bool, broadcastable to [kv_heads,
    queries, tokens]: True where the query at position prompt + i reads the packed copy, False where
    it reads the exact one. A query must never read a packed copy that would not exist yet when that
    token is decoded; what the mask says of tokens after the query does not matter. All on one
    device, that of LayerInput.k.
    extra_bits: bits held beside packed and exact tokens (pools, tables of this layer).
    """

    k: Tensor
    v: Tensor
    k_packed: Tensor
    v_packed: Tensor
    extra_bits: float = 0.0


class Codec(abc.ABC):
    """A cache format as quantise-dequantise on whole documents.

    name: short, with its setting. label: the setting for tables, such as "KIVI-2 g32 R128".
    """

    name: str = ""
    label: str = ""

    @abc.abstractmethod
    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        """Bits per element of packed K and of packed V, all metadata counted, windows not."""

    @abc.abstractmethod
    def encode(self, layer: LayerInput) -> LayerCodes:
        """What queries prompt..tokens-1 of this layer read."""


def sliding_packed(
    prompt: int,
    tokens: int,
    window: int,
    sinks: int = 0,
    group: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mask bool [queries, tokens] of a window that slides in steps of `group` tokens, on `device`.

    Query p reads token t packed if t >= sinks and its group of `group` tokens ends at or below
    p + 1 - window, that is, the newest `window` tokens (the query's own included) and the
    unfinished group are exact.
    """
    position = torch.arange(prompt, tokens, device=device)[:, None]
    end = (torch.arange(tokens, device=device) // group + 1) * group
    packed = end[None, :] <= position + 1 - window
    packed[:, :sinks] = False
    return packed


def bits_resident(codec: Codec, codes: LayerCodes, layer: LayerInput) -> float:
    """Mean bits per K and V element of one layer at the end of the document, everything counted.

    A token that the queries read exactly costs 16 bits, one that they read packed the codec's bits:
    the mean over the last 256 queries, since residuals fill and flush.
    """
    kv_heads, tokens, head_dim = layer.k.shape
    queries = layer.queries
    last = min(queries, _RESIDENT_QUERIES)
    position = torch.arange(tokens - last, tokens, device=layer.k.device)[:, None]
    held = torch.arange(tokens, device=layer.k.device)[None, :] <= position  # [last, tokens]
    total = 0.0
    sides = zip((codes.k_packed, codes.v_packed), codec.bits(head_dim, kv_heads), strict=True)
    for packed, bits in sides:
        rows = packed.expand(kv_heads, queries, tokens)[:, queries - last :] & held
        share = (rows.sum(-1) / (position.squeeze(1) + 1)).mean().item()
        total += share * bits + (1 - share) * EXACT_BITS
    return total / 2 + codes.extra_bits / (2 * kv_heads * tokens * head_dim)
