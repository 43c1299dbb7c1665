# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""OTT, Outlier Tokens Tracing (Su et al., arXiv 2505.10938, section 3 and algorithm 1).

Quantised like KIVI (K per channel over G tokens, V per token over G channels, A_float, 2 bits,
16-bit step and minimum) in blocks of G = 128 tokens; the R = 32 newest tokens are exact, and so is
the block that is not complete. Per KV head, when a block is packed:

1. candidates = the block's tokens and those in the outlier pool (capacity n = 3), each with
   m_t = sum over channels of |K[t, c]|;
2. the n candidates of smallest m_t are the new pool, exact in K and V from then on;
3. those of them that lie in the block are replaced in K by the mean of the block's other tokens
   before the range is taken, and are masked in the packed copy;
4. tokens that leave the pool go to a side pool and stay exact; when it holds 32, tracing stops;
5. the first layer has n = 0.

Bits: 2 + 32 / 128 for K, 2 + 32 / min(128, head_dim) for V; pools cost 16 bits an element and a
32-bit position a token on top, as `extra_bits` and the masks say.

Choices: R is kept full (32 to 159 exact tokens). The authors switch tracing off in one or two first
layers; one is better on SmolLM2. V's group is channel_group(head_dim). The side pool is tested
before a block, so it may end with up to n - 1 tokens more. The prompt is packed block by block like
the rest. With `equal_window` the pools stay: they are the method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec import LayerCodes, LayerInput
from .common import (
    Baseline,
    Quantised,
    affine_float,
    by_channels,
    by_tokens,
    channel_group,
    check_bits,
)

_POSITION_BITS = 32  # where a pool token belongs


class Ott(Baseline):
    """KIVI's axes in blocks of 128 tokens, with the tokens of smallest |K| kept exact."""

    def __init__(
        self,
        bits: int = 2,
        block: int = 128,
        residual: int = 32,
        outliers: int = 3,
        side_pool: int = 32,
        plain_layers: int = 1,
        equal_window: bool = False,
    ) -> None:
        check_bits("bits", bits)
        label = f"OTT-{bits} g{block} n{outliers}" + ("" if equal_window else f" R{residual}")
        super().__init__(f"ott{bits}", label, 0, block, equal_window)
        self.code_bits, self.block, self.residual = bits, block, residual
        self.outliers, self.side_pool, self.plain_layers = outliers, side_pool, plain_layers

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        """See Codec."""
        return self.code_bits + 32 / self.block, self.code_bits + 32 / channel_group(head_dim)

    def pooled(self, layer: LayerInput) -> Tensor:
        """bool [kv_heads, tokens]: tokens that end in the pool or the side pool of their head."""
        heads, tokens, _ = layer.k.shape
        device = layer.k.device
        found = torch.zeros(heads, tokens, dtype=torch.bool, device=device)
        if layer.layer < self.plain_layers or self.outliers == 0:
            return found
        magnitude = layer.k.abs().sum(-1)
        pool = torch.full((heads, self.outliers), torch.inf, device=device)
        where = torch.full((heads, self.outliers), -1, device=device)
        # Tokens that were ever in the pool.
        entered = torch.zeros(heads, 1, dtype=torch.long, device=device)
        for start in range(self.sinks, tokens - self.block + 1, self.block):
            tracing = entered - self.outliers < self.side_pool  # the rest of them left it
            block = magnitude[:, start : start + self.block]
            place = torch.arange(start, start + self.block, device=device).expand(heads, -1)
            smallest = torch.cat([pool, block], 1).topk(self.outliers, largest=False)
            chosen = torch.cat([where, place], 1).gather(1, smallest.indices)
            fresh = tracing & (chosen >= start)
            found[fresh.nonzero()[:, 0], chosen[fresh]] = True
            entered = entered + fresh.sum(1, keepdim=True)
            pool = torch.where(tracing, smallest.values, pool)
            where = torch.where(tracing, chosen, where)
        return found

    def quantise(self, layer: LayerInput) -> tuple[Quantised, Quantised]:
        """See Baseline."""
        pooled = self.pooled(layer)
        k = by_tokens(
            replaced(layer.k, pooled, self.sinks, self.block),
            self.sinks,
            self.block,
            lambda x: affine_float(x, self.code_bits, dim=-2),
        )
        group = channel_group(layer.v.shape[-1])
        v = by_channels(layer.v, group, lambda x: affine_float(x, self.code_bits))
        return k, v

    def limits(self, position: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """See Baseline."""
        limit = (position - self.residual).clamp(min=0) // self.block * self.block
        return limit, limit

    def encode(self, layer: LayerInput) -> LayerCodes:
        """See Codec."""
        codes = super().encode(layer)
        pooled = self.pooled(layer)
        codes.k_packed = codes.k_packed & ~pooled[:, None]
        codes.v_packed = codes.v_packed & ~pooled[:, None]
        head_dim = layer.k.shape[-1]
        # The slot of a pool token in the packed block stays, masked.
        slot = head_dim * sum(self.bits(head_dim, layer.k.shape[0])) + _POSITION_BITS
        codes.extra_bits = float(pooled.sum()) * slot
        return codes


def replaced(k: Tensor, pooled: Tensor, start: int, block: int) -> Tensor:
    """k [kv_heads, tokens, head_dim] with pooled tokens set to the mean of their block's others."""
    count = max(0, k.shape[1] - start) // block
    end = start + count * block
    rows = k[:, start:end].unflatten(1, (count, block))
    out = pooled[:, start:end].unflatten(1, (count, block))[..., None]
    others = (~out).sum(2, keepdim=True).clamp(min=1)
    mean = (rows * ~out).sum(2, keepdim=True) / others
    result = k.clone()
    result[:, start:end] = torch.where(out, mean, rows).flatten(1, 2)
    return result
