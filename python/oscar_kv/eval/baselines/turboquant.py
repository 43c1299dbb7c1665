# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""TurboQuant (Zandieh et al., arXiv 2504.19874, sections 3.1, 3.2 and 4.3) and "TurboQuant+".

Q_b on a vector x of dimension d: g = ||x||, y = Pi x / g with Pi random orthogonal (QR of a
Gaussian matrix), idx = nearest centroid of the Lloyd-Max code of a coordinate of a random unit
vector, x' = g Pi^T c[idx]. Stored: idx and g (fp16). The density is (1 - u^2)^((d - 3) / 2), as in
the paper, which tends to N(0, 1/d); for the 16 outlier channels of head_dim 64 it fits better.

`TurboQuant`, 2.5 bit: per head the quarter of the channels with the largest mean magnitude (32 of
128) gets Q_3, the others Q_2, with two independent rotations and norms; K and V alike. Bits: 2.25 +
32 / head_dim. The channels are chosen on the prompt. `product` is the paper's inner-product variant
for K: Q_(b-1), then of the residual r the signs of S r (S a d x d Gaussian matrix) and ||r||,
x' += sqrt(pi / 2) / d ||r|| S^T sign(S r); unbiased, 32 / head_dim bits more. It is off by default,
as its variance costs attention more than the bias that it removes.

`TurboQuantPlus` ("turbo2"): Pi = H diag(random signs), one norm a block of channels (128, or the
head where head_dim is no multiple of 128; 32 may be asked for), corrected so that the norm of x' is
exact: g = ||y|| / ||c[idx]||. Bits: b + 16 / block.

Window: none, no sinks. Rotations depend on LayerInput.seed and the layer, not on data.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..codec import LayerInput
from .common import (
    Baseline,
    Quantised,
    by_channels,
    channel_group,
    check_bits,
    check_divides,
    hadamard,
)

_GRID = 400001
_ROUNDS = 1000


@functools.cache
def lloyd_max(bits: int, dim: int) -> Tensor:
    """Centroids, ascending, of a coordinate of a random unit vector times sqrt(dim).

    float32 [2^bits] on the CPU; dim >= 4. Lloyd's iteration on a grid, until it stands still or
    1000 rounds.
    """
    reach = min(math.sqrt(dim), 9.0)
    u = torch.linspace(-reach, reach, _GRID, dtype=torch.float64)
    density = (1 - u * u / dim).clamp(min=0).pow((dim - 3) / 2)
    mass, moment = density.cumsum(0), (density * u).cumsum(0)
    # Start from the quantiles of density^(1/3), which are optimal for many levels.
    spread = density.pow(1 / 3).cumsum(0)
    levels = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits * spread[-1]
    centroids = u[torch.searchsorted(spread, levels).clamp(max=_GRID - 1)]
    zero = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUNDS):
        edge = torch.searchsorted(u, (centroids[1:] + centroids[:-1]) / 2) - 1
        parts = [torch.cat([zero, c[edge], c[-1:]]).diff() for c in (mass, moment)]
        new = parts[1] / parts[0].clamp(min=1e-300)
        done = bool((new - centroids).abs().max() < 1e-9)
        centroids = new
        if done:
            break
    return ((centroids - centroids.flip(0)) / 2).float()


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of the ascending centroids, int64 like x."""
    return torch.bucketize(x, (centroids[1:] + centroids[:-1]) / 2)


def random_rotation(dim: int, generator: torch.Generator) -> Tensor:
    """Orthogonal float32 [dim, dim] on the CPU: Q of the QR decomposition of a Gaussian matrix."""
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


def quantise_vectors(x: Tensor, bits: int, rotation: Tensor) -> Quantised:
    """Q_b on the last axis of x; bits 0 reads as zero."""
    if bits == 0:
        none = torch.empty(0, dtype=torch.uint8, device=x.device)
        return Quantised(torch.zeros_like(x), none, 0, ())
    dim = x.shape[-1]
    centroids = lloyd_max(bits, dim).to(x.device)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit = x / torch.where(norm > 0, norm, 1)
    codes = nearest((unit @ rotation.T) * math.sqrt(dim), centroids)
    stored = norm.half()
    values = (centroids[codes] @ rotation) * (stored.float() / math.sqrt(dim))
    return Quantised(values, codes.byte(), bits, (stored,))


def quantise_product(x: Tensor, bits: int, rotation: Tensor, projection: Tensor) -> Quantised:
    """The inner-product variant of Q_b; projection: Gaussian [dim, dim]."""
    found = quantise_vectors(x, bits - 1, rotation)
    rest = x - found.values
    norm = torch.linalg.vector_norm(rest, dim=-1, keepdim=True).half()
    signs = torch.where(rest @ projection.T >= 0, 1.0, -1.0)
    scale = math.sqrt(math.pi / 2) / x.shape[-1]
    values = found.values + scale * norm.float() * (signs @ projection)
    high = found.codes if bits > 1 else torch.zeros_like(signs, dtype=torch.uint8)
    codes = high * 2 + (signs > 0)
    return Quantised(values, codes.byte(), bits, (*found.metadata, norm))


class TurboQuant(Baseline):
    """Random rotation and Lloyd-Max codes, `bits` + 1 for the quarter of outlier channels."""

    def __init__(self, bits: int = 2, product: bool = False, equal_window: bool = False) -> None:
        if not 1 <= bits <= 7:
            raise ValueError(f"bits must be in 1..7 (outlier channels have one more), got {bits}")
        kind = "-product" if product else ""
        label = f"TurboQuant {bits}.5" + (" product K" if product else "")
        super().__init__(f"turboquant{bits}.5{kind}", label, equal_window=equal_window)
        self.low_bits, self.product = bits, product

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        """See Codec."""
        v = self.low_bits + (head_dim // 4) / head_dim + 32 / head_dim
        return v + (32 / head_dim if self.product else 0), v

    def quantise(self, layer: LayerInput) -> tuple[Quantised, Quantised]:
        """See Baseline. Raises ValueError for an empty prompt or head_dim below 16."""
        if layer.prompt < 1:
            raise ValueError("prompt must be at least 1 token: outlier channels are chosen there")
        generator = torch.Generator().manual_seed(1000003 * layer.seed + layer.layer)
        k = self._quantise(layer.k, layer.prompt, generator, self.product)
        v = self._quantise(layer.v, layer.prompt, generator, False)
        return k, v

    def _quantise(
        self, x: Tensor, prompt: int, generator: torch.Generator, product: bool
    ) -> Quantised:
        head_dim = x.shape[-1]
        outliers = head_dim // 4
        if outliers < 4:
            raise ValueError(f"head_dim must be at least 16, got {head_dim}")
        order = x[:, :prompt].abs().mean(1).argsort(descending=True)  # [kv_heads, head_dim]
        order = order[:, None].expand(-1, x.shape[1], -1)
        parts = x.gather(-1, order).split([outliers, head_dim - outliers], -1)
        found = []
        for part, bits in zip(parts, (self.low_bits + 1, self.low_bits), strict=True):
            dim = part.shape[-1]
            rotation = random_rotation(dim, generator).to(x.device)
            if product:
                projection = torch.randn(dim, dim, generator=generator).to(x.device)
                found.append(quantise_product(part, bits, rotation, projection))
            else:
                found.append(quantise_vectors(part, bits, rotation))
        joined = torch.cat([f.values for f in found], -1)
        values = torch.empty_like(x).scatter_(-1, order, joined)
        codes = torch.cat([f.codes for f in found], -1)
        mean_bits = self.low_bits + outliers / head_dim
        return Quantised(values, codes, mean_bits, found[0].metadata + found[1].metadata)


class TurboQuantPlus(Baseline):
    """Hadamard with random signs, Lloyd-Max codes, corrected norms."""

    def __init__(self, bits: int = 2, block: int | None = None, equal_window: bool = False) -> None:
        check_bits("bits", bits)
        size = "" if block is None else f" g{block}"
        name = f"turbo{bits}" + size.replace(" ", "-")
        super().__init__(name, f"TurboQuant+ {bits}{size}", equal_window=equal_window)
        self.code_bits, self.block = bits, block

    def _block(self, head_dim: int) -> int:
        block = channel_group(head_dim) if self.block is None else self.block
        check_divides("block", block, "head_dim", head_dim)
        return block

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        """See Codec."""
        bits = self.code_bits + 16 / self._block(head_dim)
        return bits, bits

    def quantise(self, layer: LayerInput) -> tuple[Quantised, Quantised]:
        """See Baseline."""
        generator = torch.Generator().manual_seed(1000003 * layer.seed + layer.layer)
        head_dim = layer.k.shape[-1]
        found = []
        for x in (layer.k, layer.v):
            signs = torch.randint(0, 2, (head_dim,), generator=generator).to(x.device) * 2.0 - 1.0
            y = by_channels(hadamard(x * signs), self._block(head_dim), self._quantise_block)
            y.values = hadamard(y.values) * signs
            found.append(y)
        return found[0], found[1]

    def _quantise_block(self, y: Tensor) -> Quantised:
        dim = y.shape[-1]
        centroids = lloyd_max(self.code_bits, dim).to(y.device)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        codes = nearest(y * (math.sqrt(dim) / torch.where(norm > 0, norm, 1)), centroids)
        found = centroids[codes]
        stored = (norm / torch.linalg.vector_norm(found, dim=-1, keepdim=True)).half()
        return Quantised(found * stored.float(), codes.byte(), self.code_bits, (stored,))
