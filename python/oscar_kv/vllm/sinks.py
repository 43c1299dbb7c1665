# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Sinks of a request that starts with a prefix-cache hit.

Its first tokens were computed by another request, so only their packed copies are there. The
kernels read sinks from the exact memory: what the codes say is written there once, at the request's
first step. That may be the step that computes the first tokens, too: vLLM lets a request share the
blocks of another one as soon as that is scheduled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotate import channel_signs, hadamard
from .spec import SINKS, TILE_TOKENS

_BITS = {"k2v2": (2, 2), "k4v2": (4, 2), "k4v4": (4, 4)}


def unpack_first(tiles: Tensor, head_dim: int, format: str) -> tuple[Tensor, Tensor]:
    """K and V of tokens 0..SINKS-1 of tiles uint8 ``[..., tile_bytes]``, in the rotated basis.

    float32 ``[..., SINKS, head_dim]`` each; the layout is that of include/oscar/format.hpp. Token t
    of the first 8 stands at position 4 t: its K words are every fourth, its V bytes the first of
    quad t.
    """
    k_bits, v_bits = _BITS[format]
    k_bytes, v_bytes = TILE_TOKENS * head_dim * k_bits // 8, TILE_TOKENS * head_dim * v_bits // 8
    sizes = [k_bytes, v_bytes, head_dim, TILE_TOKENS, TILE_TOKENS, TILE_TOKENS]
    used = tiles[..., : sum(sizes)].split(sizes, dim=-1)
    k_codes, v_codes, params, v_scales, v_mids, norms = used

    def scales(codes: Tensor) -> Tensor:
        u = codes[..., : 4 * SINKS : 4].float()
        return torch.where(u > 0, torch.exp2(u / 8 - 16), 0.0)[..., None]

    words = k_codes.unflatten(-1, (-1, TILE_TOKENS, 4))[..., : 4 * SINKS : 4, :]
    shifts = torch.arange(0, 8, k_bits, dtype=torch.uint8, device=tiles.device)
    # [..., line, token, byte, field] -> [..., token, line, field, byte]: channels in order.
    codes = (words[..., None] >> shifts & (1 << k_bits) - 1).transpose(-4, -3).transpose(-2, -1)
    # The top bits of the norms, position 0 first, are two bf16 numbers.
    places = torch.arange(8, dtype=torch.uint8, device=tiles.device)
    units = (norms.unflatten(-1, (4, 8)) >> 7 << places).sum(-1).to(torch.uint8)
    limits = units.view(torch.bfloat16).float()
    scale = (params & 15).float() * (limits[..., :1] / 15)
    mid = ((params >> 4).float() - 7) * (limits[..., 1:] / 7)
    middle = ((1 << k_bits) - 1) / 2
    k = mid[..., None, :] + scale[..., None, :] * (codes.flatten(-3).float() - middle)
    k = k * scales(norms & 127)

    quads = v_codes.unflatten(-1, (TILE_TOKENS // 4, -1, 4))[..., :SINKS, :, 0]
    shifts = torch.arange(0, 8, v_bits, dtype=torch.uint8, device=tiles.device)
    fields = quads[..., None, :] >> shifts[:, None] & (1 << v_bits) - 1
    v_mid = v_mids[..., : 4 * SINKS : 4].contiguous().view(torch.int8).float()[..., None] / 64
    v = scales(v_scales) * (v_mid + fields.flatten(-2).float() - ((1 << v_bits) - 1) / 2)
    return k, v


def restore_sinks(
    pages: Tensor, exact: Tensor, first: Tensor, slot: Tensor, format: str, balance: Tensor | None
) -> None:
    """Writes the sinks of requests into their exact memory, as their packed copies read.

    pages, exact: of spec.py; first int64 ``[requests]``: page of token 0; slot int64 ``[requests,
    exact_blocks]``; balance float32 ``[kv_heads, head_dim]`` or None.
    """
    head_dim = exact.shape[-1]
    k, v = unpack_first(pages[first, :, 0], head_dim, format)  # [requests, kv_heads, SINKS, dim]
    signs = channel_signs(head_dim).to(k.device)
    k, v = hadamard(k) * signs, hadamard(v) * signs
    if balance is not None:
        k = k * balance[:, None]
    halves = 2 if slot.shape[1] == 4 else 1
    rows = SINKS // halves
    for side, sinks in enumerate((k, v)):
        for half, part in enumerate(sinks.to(exact.dtype).split(rows, dim=2)):
            block = 0 if slot.shape[1] == 1 else side * halves + half
            plane = side if slot.shape[1] == 1 else 0
            exact[slot[:, block], plane, :, -rows:] = part
