# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The rotation of docs/format.md in torch, for what is computed once a model or in simulations."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last dimension, in blocks of its largest power of two.

    Its own inverse. Additions in the order of the kernels.
    """
    head_dim = x.shape[-1]
    block = head_dim & -head_dim
    distance = 1
    while distance < block:
        pair = x.unflatten(-1, (-1, 2, distance))
        a, b = pair[..., 0, :], pair[..., 1, :]
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        distance *= 2
    return x * torch.tensor(block, dtype=torch.float32).rsqrt()


@functools.cache
def channel_signs(head_dim: int) -> Tensor:
    """Fixed pseudo-random signs [head_dim]: the finaliser of MurmurHash3 on channel + 1."""
    signs = []
    for channel in range(head_dim):
        h = channel + 1
        h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
        h ^= h >> 16
        signs.append(-1.0 if h & 1 else 1.0)
    return torch.tensor(signs)


@functools.cache
def rotation(head_dim: int) -> Tensor:
    """Signs and transform as a matrix: a row vector times this is rotated. float64 [head_dim,
    head_dim]."""
    return (hadamard(torch.eye(head_dim)) * channel_signs(head_dim)[:, None]).double()


def rotated_center(center: Tensor, balance: Tensor | None) -> Tensor:
    """`CacheView::center` of a center in the model's basis, both float32 [kv_heads, head_dim]."""
    factor = channel_signs(center.shape[-1]).to(center)
    return hadamard(center * (factor if balance is None else factor / balance)).contiguous()
