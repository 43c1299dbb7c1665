# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Sinks of a request that starts with a prefix-cache hit.

Its first tokens were computed by another request, so only their packed copies are there. The
kernels read sinks from the exact memory: what the codes say is written there once, at the request's
first step. That may be the step that computes the first tokens, too: vLLM lets a request share the
blocks of another one as soon as that is scheduled.

Every layer does this while a device waits, so what is fixed lies on the device, and nothing here
waits for it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import Calibration
from ..rotate import rotation
from .layout import SINKS, TILE_TOKENS

_BITS = {"k2v2": (2, 2), "k4v2": (4, 2), "k4v4": (4, 4)}
_K, _V = 0, 1


@dataclass(frozen=True)
class _Tile:
    """Where the numbers of the first tokens stand in a tile, and what their values are.

    The layout is that of include/oscar/format.hpp. Token t of the first 8 stands at position 4 t:
    its K words are every fourth, its V bytes the first of quad t. Leading dimension 2: K and V.
    """

    code: Tensor  # int64 [2, SINKS, head_dim]: byte of a code
    shift: Tensor  # uint8, likewise: its lowest bit
    mask: Tensor  # uint8 [2, 1, 1]
    middle: Tensor  # float32 [2, 1, 1]: of the codes
    level: Tensor  # int64 [2, SINKS]: byte of a norm of K, of a scale of V
    level_mask: Tensor  # uint8 [2, 1]
    levels: Tensor  # float32 [256]: what such a byte says
    v_mid: Tensor  # int64 [SINKS, 1]: byte of a mid of V
    params: slice  # bytes of K's channels
    steps: Tensor  # float32 [2, 256]: scale and mid that such a byte says, in their units
    norms: slice
    places: Tensor  # uint8 [8]
    rotation: Tensor  # float32 [head_dim, head_dim]: back to the model's basis


@functools.cache
def _tile(head_dim: int, format: str, device: torch.device) -> _Tile:
    k_bits, v_bits = _BITS[format]
    k_bytes, v_bytes = TILE_TOKENS * head_dim * k_bits // 8, TILE_TOKENS * head_dim * v_bits // 8
    params = k_bytes + v_bytes
    v_scales, v_mids, norms = (params + head_dim + TILE_TOKENS * i for i in range(3))
    token, channel = torch.arange(SINKS)[:, None], torch.arange(head_dim)
    line, rest = channel // (32 // k_bits), channel % (32 // k_bits)
    k_code = TILE_TOKENS * 4 * line + 16 * token + rest % 4
    quad_words = v_bytes // TILE_TOKENS  # of four bytes, one a token
    v_code = k_bytes + v_bytes // 8 * token + 4 * (channel % quad_words)
    shifts = (k_bits * (rest // 4), v_bits * (channel // quad_words))
    byte = torch.arange(256)
    most = torch.tensor([(1 << k_bits) - 1, (1 << v_bits) - 1])[:, None, None]
    at = TILE_TOKENS // 8 * torch.arange(SINKS)
    fixed = {
        "code": torch.stack([k_code, v_code]),
        "shift": torch.stack(shifts)[:, None].expand(2, SINKS, -1).to(torch.uint8),
        "mask": most.to(torch.uint8),
        "middle": most / 2,
        "level": torch.stack([norms + at, v_scales + at]),
        "level_mask": torch.tensor([[127], [255]], dtype=torch.uint8),
        "levels": torch.where(byte > 0, torch.exp2(byte / 8 - 16), 0.0),
        "v_mid": v_mids + at[:, None],
        "steps": torch.stack([(2 + (byte >> 6 & 1) << (byte >> 7)) / 6, ((byte & 63) - 31) / 31]),
        "places": torch.arange(8, dtype=torch.uint8),
        "rotation": rotation(head_dim).T.float(),
    }
    return _Tile(
        params=slice(params, params + head_dim),
        norms=slice(norms, norms + TILE_TOKENS),
        **{name: x.to(device) for name, x in fixed.items()},
    )


def unpack_first(tiles: Tensor, head_dim: int, format: str) -> Tensor:
    """K and V of tokens 0..SINKS-1 of tiles uint8 ``[..., tile_bytes]``, in the rotated basis.

    float32 ``[..., 2, SINKS, head_dim]``.
    """
    tile = _tile(head_dim, format, tiles.device)
    codes = (tiles[..., tile.code] >> tile.shift & tile.mask) - tile.middle
    levels = tile.levels[(tiles[..., tile.level] & tile.level_mask).long()][..., None]
    # The top bits of the norms, position 0 first, are two bf16 numbers.
    units = (tiles[..., tile.norms].unflatten(-1, (4, 8)) >> 7 << tile.places).sum(-1)
    steps = tile.steps[:, tiles[..., tile.params].long()]  # [2, ..., head_dim]
    limits = units.to(torch.uint8).view(torch.bfloat16).float()
    scale, mid = steps * limits.movedim(-1, 0)[..., None]
    k = mid[..., None, :] + scale[..., None, :] * codes[..., _K, :, :]
    v = tiles[..., tile.v_mid].view(torch.int8) / 64 + codes[..., _V, :, :]
    return torch.stack([k, v], dim=-3) * levels


def restore_sinks(
    pages: Tensor,
    exact: Tensor,
    first: Tensor,
    slot: Tensor,
    format: str,
    calibration: Calibration,
) -> None:
    """Writes the sinks of requests into their exact memory, as their packed copies read.

    pages uint8 ``[pages, kv_heads, tiles, tile_bytes]``; exact ``[slots, planes, kv_heads, rows,
    head_dim]``; first int64 ``[requests]``: page of token 0; slot int64 ``[requests,
    exact_blocks]``; calibration: what the pages were packed with.
    """
    head_dim = exact.shape[-1]
    # [requests, kv_heads, 2, SINKS, head_dim]
    sinks = unpack_first(pages[first, :, 0], head_dim, format)
    sinks = sinks @ _tile(head_dim, format, pages.device).rotation
    if calibration.balance is not None:
        sinks[:, :, _K] *= calibration.balance[:, None]
    if calibration.center is not None:
        sinks[:, :, _K] += calibration.center[:, None]
    sinks = sinks.to(exact.dtype)
    halves = 2 if slot.shape[1] == 4 else 1
    rows = SINKS // halves
    for side in (_K, _V):
        for half, part in enumerate(sinks[:, :, side].split(rows, dim=2)):
            block = 0 if slot.shape[1] == 1 else side * halves + half
            plane = side if slot.shape[1] == 1 else 0
            exact[slot[:, block], plane, :, -rows:] = part
