# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""OSCAR of Together AI / FutureMLS (arXiv 2605.17757, sections 3 and 4; code FutureMLS-Lab/OSCAR).

Not the OScaR paper (oscar_paper.py). Calibrated; per layer one rotation for all KV heads:
Sigma_K = mean over KV heads h of Q_h^T Q_h / n (Q_h: the queries of h's group, after RoPE),
Sigma_V = mean over h of V_h^T diag(w) V_h / n, w_t = k_t (Q_h^T Q_h / n) k_t^T scaled to mean 1;
R = eigenvectors (ascending eigenvalue), Rot = R H P, P = bit-reversal order of the eigenvalues.
K, Q times Rot_K, V times Rot_V; then per (token, head): x clamped to [-a, a], a = sorted |x| at
index floor(p head_dim), p = 0.96 for K and 0.92 for V; per group of 128 channels
step = (max - min) / 3, z = -min / step, code = clamp(floor(x / step + z + 0.5), 0, 3),
x' = (code - z) step; step and z 16 bit (the paper's count; the scripts store fp32: `scale_bits`).
Bits: 2 + 2 scale_bits / group.

Window: 64 sinks, and between 256 and 263 newest tokens, the query's own included: the 8 oldest are
flushed when 263 stored ones would be joined by another.

Calibration: `calibration` of another document (see `calibrate`), or the document's own prompt,
which the method has seen by then. Nothing of the decoded tokens is used. The authors take about 30K
tokens of other text; the prompt is the better match.
"""

from __future__ import annotations

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
    hadamard_matrix,
)

_SINKS, _RECENT, _FLUSH = 64, 256, 8
_DTYPES = {16: torch.float16, 32: torch.float32}


class TogetherOscar(Baseline):
    """Rotation from query and value statistics, percentile clipping, per token and head.

    calibration: layer -> (Rot_K, Rot_V), float32 [head_dim, head_dim] each, as `calibrate` returns;
    without it each document is calibrated on its own prompt. clip None: no clamping.
    """

    def __init__(
        self,
        bits: int = 2,
        group: int | None = None,
        scale_bits: int = 16,
        clip: tuple[float, float] | None = (0.96, 0.92),
        calibration: dict[int, tuple[Tensor, Tensor]] | None = None,
        equal_window: bool = False,
    ) -> None:
        check_bits("bits", bits)
        if scale_bits not in _DTYPES:
            raise ValueError(f"scale_bits must be 16 or 32, got {scale_bits}")
        setting = f"-g{group}-fp{scale_bits}" if group or scale_bits == 32 else ""
        label = f"Together OSCAR-{bits}" + setting.replace("-", " ")
        super().__init__(f"together{bits}{setting}", label, _SINKS, 1, equal_window)
        self.code_bits, self.group, self.scale_bits = bits, group, scale_bits
        self.clip, self.calibration = clip, calibration

    def _group(self, head_dim: int) -> int:
        group = channel_group(head_dim) if self.group is None else self.group
        check_divides("group", group, "head_dim", head_dim)
        return group

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        """See Codec."""
        bits = self.code_bits + 2 * self.scale_bits / self._group(head_dim)
        return bits, bits

    def quantise(self, layer: LayerInput) -> tuple[Quantised, Quantised]:
        """See Baseline. Raises ValueError if the layer is not in `calibration`."""
        if self.calibration is None:
            rotations = calibrate(layer)
        elif layer.layer in self.calibration:
            k, v = self.calibration[layer.layer]
            rotations = k.to(layer.k.device), v.to(layer.k.device)
        else:
            raise ValueError(f"calibration has no layer {layer.layer}")
        found = []
        group, dtype = self._group(layer.k.shape[-1]), _DTYPES[self.scale_bits]
        for i, x in enumerate((layer.k, layer.v)):
            y = x @ rotations[i]
            if self.clip is not None:
                y = clamp_percentile(y, self.clip[i])
            y = by_channels(y, group, lambda z: affine_half_up(z, self.code_bits, dtype))
            y.values = y.values @ rotations[i].T
            found.append(y)
        return found[0], found[1]

    def limits(self, position: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """See Baseline."""
        first = max(self.sinks, prompt - _RECENT)  # exact after prefill
        flushes = (position - first + 1 - _RECENT).clamp(min=0) // _FLUSH
        limit = first + flushes * _FLUSH
        return limit, limit


def affine_half_up(x: Tensor, bits: int, dtype: torch.dtype) -> Quantised:
    """code = clamp(floor(x / step + z + 0.5)), x' = (code - z) step, on the last axis.

    step and z in `dtype`. A constant group reads as its value: z = 0 and step = that value, code 1.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    top = 2**bits - 1
    alive = high > low
    step = torch.where(alive, (high - low) / top, low)
    divisor = torch.where(alive, step, 1)
    shift = torch.where(alive, -low / divisor, 0)
    codes = (x / divisor + shift + 0.5).floor_().clamp_(0, top)
    codes = torch.where(alive, codes, 1)
    scale, zero = step.to(dtype), shift.to(dtype)
    return Quantised((codes - zero.float()) * scale.float(), codes.byte(), bits, (scale, zero))


def clamp_percentile(x: Tensor, share: float) -> Tensor:
    """x clamped to [-a, a], a = the sorted |x| of its last axis at index floor(share size)."""
    index = min(math.floor(share * x.shape[-1]), x.shape[-1] - 1)
    threshold = x.abs().kthvalue(index + 1, dim=-1, keepdim=True).values
    return torch.maximum(torch.minimum(x, threshold), -threshold)


def calibrate(layer: LayerInput) -> tuple[Tensor, Tensor]:
    """Rot_K and Rot_V, float32 [head_dim, head_dim], from the prompt of `layer`.

    For a calibration document pass a LayerInput whose prompt is the whole document.
    Raises ValueError for an empty prompt.
    """
    sigma_k, sigma_v = statistics(layer)
    return rotation_of(sigma_k), rotation_of(sigma_v)


def statistics(layer: LayerInput) -> tuple[Tensor, Tensor]:
    """Sigma_K and Sigma_V of the prompt, float32 [head_dim, head_dim]."""
    n = layer.prompt
    if n < 1:
        raise ValueError("prompt must be at least 1 token: Together's OSCAR is calibrated there")
    kv_heads = layer.k.shape[0]
    q = layer.q[:, :n].unflatten(0, (kv_heads, -1)).flatten(1, 2)  # [kv_heads, group n, head_dim]
    k, v = layer.k[:, :n], layer.v[:, :n]
    per_head = q.mT @ q / q.shape[1]
    weights = (k @ per_head * k).sum(-1)  # [kv_heads, n]
    weights = weights / weights.mean(-1, keepdim=True).clamp(min=1e-12)
    return per_head.mean(0), ((v * weights[..., None]).mT @ v / n).mean(0)


def rotation_of(sigma: Tensor) -> Tensor:
    """R H P of a symmetric matrix [head_dim, head_dim], float32."""
    sigma = sigma.double()
    size = sigma.shape[0]
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    place = torch.tensor(bit_reversed(size), device=sigma.device)
    order = torch.empty(size, dtype=torch.long, device=sigma.device)
    order[place] = values.argsort(descending=True)
    return (vectors @ hadamard_matrix(size, sigma.device).double())[:, order].float()


def bit_reversed(size: int) -> list[int]:
    """0..size-1 in bit-reversed order; where size is no power of two, that of the next one, cut."""
    bits = max(1, size - 1).bit_length()
    reversed_all = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [i for i in reversed_all if i < size]
