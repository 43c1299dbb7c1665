# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Our own format as a codec: the arithmetic of docs/format.md on whole documents, in torch.

With its default parameters it reads as the packed kernels do; every parameter is there to be
varied. The steps stand in the order of the format: rotate, scale, quantise K, quantise V.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..balance import Balance
from ..calibration import (
    CENTER_RATIO,
    QueryStatistics,
    calibrate_layer,
    evidence,
)
from ..rotate import channel_signs, hadamard
from .codec import Codec, LayerCodes, LayerInput, sliding_packed

_K_SHARES = {2: 0.88, 3: 0.96}  # of the (max - min) range that the codes span; other bits: 1
_FED_K_SHARES = {2: 0.94}  # with error feedback; other bits: 1
_V_SHARES = {2: 0.82, 3: 0.92}
_SCALE_BOUNDS = {2: 0.5}  # of the way from a step to the next; other bits: 0.25
_V_PARAM_BITS = 16  # 8-bit scale, 8-bit mid
_UNIT_BITS = 32  # two bf16 units a group
_FP16 = 16  # mid_bits of 16: the mid itself, as fp16
# What a K scale's indices stand for, in units of the last: bits, values.
_SCALES: dict[str, tuple[int, tuple[float, ...]]] = {
    "steps": (2, (2, 3, 4, 6)),  # the format's
    "octaves": (2, (1, 2, 4, 8)),
    "half-octaves": (2, (0.5**1.5, 0.5, 0.5**0.5, 1)),
    "third-octaves": (2, (0.5, 0.5 ** (2 / 3), 0.5 ** (1 / 3), 1)),
    "eight": (3, (4, 5, 6, 7, 8, 10, 12, 14)),
    "linear": (4, tuple(range(1, 16))),
    "fp16": (_FP16, ()),
}
_TILE_ALIGNS = ((256, 128), (128, 64), (0, 32))  # from a head_dim on, bytes


@dataclass
class Twin(Codec):
    """The packed format with changeable parameters.

    k_bits, v_bits: of a code. window, sinks: tokens that stay exact, as in `PagedCache`; tile: the
    tokens by which the window moves. k_share, v_share: part of a group's range that the codes span
    (0: the format's). group: tokens of a K group (divides tile); scale: how its scale is stored, a
    name of _SCALES; scale_bound: where between two steps a scale is rounded up (0: the format's);
    mid_bits: of its mid (16: fp16 without a unit); reach: 1 widens a scale so that
    codes span the channel around the mid as it is stored. v_group: channels of a V group, 0: all of
    a head. center: "prompt" takes the constant part off the keys of heads where it exceeds
    center_ratio times the rest (balance.py), "none" does not.
    norm: K's norm per "head" and token, per token over the "layer", or "none"; norm_steps: stored
    values an octave, a power of two, over the 16 octaves below a tile's largest (0: not rounded,
    counted as 16 bits); norm_blocks: norms a head, each for head_dim / norm_blocks
    rotated channels. balance: "prompt" (measured on the first balance_tokens of the prompt; 0: on
    all), "none" or a file that `oscar calibrate` wrote. rotate: 0 leaves channels as they are.
    feedback: "prompt" (the rounding errors of K are carried on, see feedback.py; measured as the
    balance or read from its file) or "none"; it needs the rotation. rounding: "nearest"; "norm"
    then refits each token's norm so that <k', k> = <k, k>, which keeps the score of a query along
    the key unbiased; "mean" refits each K mid so that the mean error of a channel in its group is
    0.
    """

    k_bits: int = 2
    v_bits: int = 2
    window: int = 32
    sinks: int = 4
    tile: int = 32
    k_share: float = 0.0
    v_share: float = 0.0
    group: int = 32
    scale: str = "steps"
    scale_bound: float = 0.0
    mid_bits: int = 6
    reach: int = 1
    v_group: int = 0
    center: str = "prompt"
    center_ratio: float = CENTER_RATIO
    norm: str = "head"
    norm_steps: int = 8
    norm_blocks: int = 1
    balance: str = "prompt"
    balance_tokens: int = 0
    rotate: int = 1
    feedback: str = "prompt"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        _check("norm", self.norm, ("head", "layer", "none"))
        _check("scale", self.scale, tuple(_SCALES))
        _check("center", self.center, ("prompt", "none"))
        _check("feedback", self.feedback, ("prompt", "none"))
        _check("rounding", self.rounding, ("nearest", "norm", "mean"))
        if self.group < 1 or self.tile % self.group:
            raise ValueError(f"group is {self.group}, must divide tile = {self.tile}")
        for side, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if not 1 <= bits <= 8:
                raise ValueError(f"{side} is {bits}, must be 1 to 8")
        changed = [
            f"{field.name}={value}"
            for field in fields(self)
            if field.name not in ("k_bits", "v_bits")
            and (value := getattr(self, field.name)) != field.default
        ]
        self.name = f"k{self.k_bits}v{self.v_bits}-twin"
        self.label = " ".join([f"twin k{self.k_bits}v{self.v_bits}", *changed])

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        """Of a tile, its padding counted with K."""
        norms = {"head": self.norm_blocks, "layer": 1 / kv_heads, "none": 0}[self.norm]
        units = _UNIT_BITS / (self.group * head_dim)
        norm_bits = 4 + self.norm_steps.bit_length() - 1 if self.norm_steps else 16
        params = (_SCALES[self.scale][0] + self.mid_bits) / self.group
        k = self.k_bits + params + units + norms * norm_bits / head_dim
        v = self.v_bits + _V_PARAM_BITS / (self.v_group or head_dim)
        elements = self.tile * head_dim
        align = 8 * next(size for least, size in _TILE_ALIGNS if head_dim >= least)
        padded = math.ceil((k + v) * elements / align) * align / elements
        return padded - v, v

    def encode(self, layer: LayerInput) -> LayerCodes:
        """See LayerCodes; the last, incomplete tile is returned as it came."""
        size = (layer.prompt, layer.tokens, self.window, self.sinks, self.tile)
        packed = sliding_packed(*size, device=layer.k.device)
        count = layer.tokens // self.tile * self.tile
        k, v = layer.k.clone(), layer.v.clone()
        if count:
            balance, weights, center = self.measure(layer)
            sign = (
                channel_signs(k.shape[-1]).to(balance) if self.rotate else torch.ones_like(k[0, 0])
            )
            forward = (sign / balance)[:, None]
            moved = self._turn(center[:, None] * forward)
            y = self._turn(layer.k[:, :count] * forward) - moved
            k[:, :count] = self._turn(self._code_k(y, weights) + moved) / forward
            y = self._turn(layer.v[:, :count] * sign)
            v[:, :count] = self._turn(self._code_v(y)) * sign
        return LayerCodes(k, v, packed, packed)

    def measure(self, layer: LayerInput) -> tuple[Tensor, Tensor | None, Tensor]:
        """Balance [kv_heads, head_dim], the weights of the feedback, as `feedback_factors`, and the
        center [kv_heads, head_dim], unrotated."""
        kv_heads, _, head_dim = layer.k.shape
        balance = torch.ones(kv_heads, head_dim, device=layer.k.device)
        center = torch.zeros_like(balance)
        if self.balance not in ("prompt", "none"):
            known = _balance_file(self.balance)
            on = layer.k.device
            found = known.feedback.get(layer.layer) if self.feedback == "prompt" else None
            if self.center == "prompt":
                center = known.centers.get(layer.layer, center).to(on)
            weights = None if found is None else found.to(on).float()
            return known.factors.get(layer.layer, balance).to(on), weights, center
        asked = "prompt" in (self.balance, self.center, self.feedback)
        if not asked or not layer.q.numel():
            return balance, None, center
        tokens = min(layer.prompt, self.balance_tokens or layer.prompt)
        queries = QueryStatistics()
        queries.observe(layer.q[:, :tokens].transpose(0, 1))
        keys, values = ([x[:, :tokens].transpose(0, 1)] for x in (layer.k, layer.v))
        found = calibrate_layer(
            keys,
            queries,
            evidence(values),
            None if self.balance == "prompt" else balance,
            self.center_ratio,
        )
        if found is None or found.balance is None:
            return balance, None, center
        if self.center == "prompt" and found.center is not None:
            center = found.center
        weights = found.feedback
        if self.feedback == "none" or not self.rotate or weights is None:
            return found.balance, None, center
        return found.balance, weights.float(), center

    # -- rotate --------------------------------------------------------------------------------

    def _turn(self, x: Tensor) -> Tensor:
        return hadamard(x) if self.rotate else x

    # -- scale ---------------------------------------------------------------------------------

    def _norms(self, y: Tensor) -> Tensor:
        """Stored norm of every value's block, [kv_heads, tokens, norm_blocks, 1]."""
        square = y.unflatten(-1, (self.norm_blocks, -1)).square().mean(-1, keepdim=True)
        if self.norm == "layer":
            square = square.mean(0, keepdim=True)
        return self._round_norm(square.sqrt())

    def _round_norm(self, norm: Tensor) -> Tensor:
        if not self.norm_steps:
            return norm
        index = torch.round(self.norm_steps * norm.log2())
        low, high = 1 - 20 * self.norm_steps, 12 * self.norm_steps - 1
        stored = torch.exp2(index.clamp(low, high) / self.norm_steps)
        return torch.where(norm > 0, stored, torch.zeros_like(norm))

    def _stored(self, norm: Tensor) -> Tensor:
        """Rounded norms as their tile stores them: 0 for those 15 octaves below its largest."""
        tiles = norm.unflatten(1, (-1, self.group))
        above = torch.frexp(tiles.amax(2, keepdim=True)).exponent  # all norms are below 2^above
        least = torch.ldexp(torch.ones_like(above, dtype=torch.float32), above - 16)
        return torch.where(tiles > least, tiles, torch.zeros_like(tiles)).flatten(1, 2)

    # -- quantise K ----------------------------------------------------------------------------

    def _code_k(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """What rotated keys y [kv_heads, tokens, head_dim] read as."""
        if self.norm == "none":
            return self._code_channels(y, weights)
        norm = self._norms(y)
        blocks = y.unflatten(-1, (self.norm_blocks, -1))
        scaled = torch.where(norm > 0, blocks / norm, torch.zeros_like(blocks))
        if weights is not None and self.norm_blocks > 1:
            # One norm a token scales all its errors alike; several do not: only within a block.
            block = torch.arange(y.shape[-1], device=y.device) // blocks.shape[-1]
            weights = weights * (block[:, None] == block)
        coded = self._code_channels(scaled.flatten(-2), weights)
        coded = coded.unflatten(-1, (self.norm_blocks, -1))
        if self.rounding == "norm":
            over = (coded * scaled).sum(-1, keepdim=True)
            factor = scaled.square().sum(-1, keepdim=True) / over
            norm = self._round_norm(norm * torch.where(over > 0, factor, 1.0).clamp(0.5, 2.0))
        return (coded * self._stored(norm)).flatten(-2)

    def _code_channels(self, z: Tensor, weights: Tensor | None) -> Tensor:
        """Per channel and group of tokens: a mid, a scale and codes."""
        top = 2**self.k_bits - 1
        groups = z.unflatten(1, (-1, self.group))  # [kv_heads, groups, group, head_dim]
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        mid = 0.5 * (high + low)
        shares = _K_SHARES if weights is None else _FED_K_SHARES
        scale = (self.k_share or shares.get(self.k_bits, 1.0)) / top * (high - low)
        scale, stored = self._store(scale, mid)
        if self.rounding == "mean":
            error = groups - _dequantise(groups, scale, stored, top)
            scale, stored = self._store(scale, stored + error.mean(2, keepdim=True))
        if weights is not None:
            return _round_with_feedback(z, scale, stored, top, weights)
        return _dequantise(groups, scale, stored, top).flatten(1, 2)

    def _store(self, scale: Tensor, mid: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and mid as they are stored: indices in units of a group's largest."""
        top_mid = 2 ** (self.mid_bits - 1) - 1
        most = mid.abs().amax(-1, keepdim=True).bfloat16().float()
        stored = mid.half().float()
        if self.mid_bits != _FP16:
            unit = most / top_mid
            stored = torch.round(_ratio(mid, unit)).clamp(-top_mid, top_mid) * unit
        largest = scale.amax(-1, keepdim=True)
        if self.reach:
            top = 2**self.k_bits - 1
            largest = largest + most * (1 / (top_mid * top))
            scale = scale + (2 / top) * (mid - stored).abs()
        bits, steps = _SCALES[self.scale]
        if bits == _FP16:
            return scale.half().float(), stored
        unit = largest.bfloat16().float() / steps[-1]
        bound = self.scale_bound or _SCALE_BOUNDS.get(self.k_bits, 0.25)
        index = torch.zeros_like(scale, dtype=torch.long)
        for low, high in itertools.pairwise(steps):
            index += scale > (low + bound * (high - low)) * unit
        return torch.tensor(steps, device=scale.device)[index] * unit, stored

    # -- quantise V ----------------------------------------------------------------------------

    def _code_v(self, y: Tensor) -> Tensor:
        """What rotated values y [kv_heads, tokens, head_dim] read as."""
        top = 2**self.v_bits - 1
        groups = y.unflatten(-1, (-1, self.v_group or y.shape[-1]))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        mid = 0.5 * (high + low)
        step = (self.v_share or _V_SHARES.get(self.v_bits, 1.0)) / top * (high - low)
        # The mid reaches 127 / 64 scales: a vector that lies on one side of 0 needs more.
        scale = torch.maximum(step, (mid.abs() + 0.5 * top * step) / (127 / 64 + 0.5 * top))
        stored = torch.exp2(torch.round(8 * scale.log2()).clamp(-127, 127) / 8)
        stored = torch.where(scale > 0, stored, torch.zeros_like(scale))
        mid = torch.round(_ratio(64 * mid, stored)).clamp(-127, 127) * (stored / 64)
        return _dequantise(groups, stored, mid, top).flatten(-2)


def _dequantise(x: Tensor, scale: Tensor, mid: Tensor, top: int) -> Tensor:
    code = torch.round(_ratio(x - mid, scale) + top / 2).clamp(0, top)
    return mid + scale * (code - top / 2)


def _round_with_feedback(
    z: Tensor, scale: Tensor, mid: Tensor, top: int, weights: Tensor
) -> Tensor:
    """`_dequantise`, channel by channel: the error of each is carried on to those behind it.

    z: [heads, tokens, channels]; scale, mid: [heads, groups, 1, channels]; weights: [heads,
    channels, channels].
    """
    groups = scale.shape[1]
    rest = z.mT.contiguous()  # the tokens of a channel side by side: that is what a step works on
    scale, mid = scale.permute(0, 3, 1, 2), mid.permute(0, 3, 1, 2)
    for c in range(z.shape[-1]):
        x = rest[:, c].unflatten(1, (groups, -1))
        read = _dequantise(x, scale[:, c], mid[:, c], top)
        error = (x - read).flatten(1)
        rest[:, c] = read.flatten(1)
        rest[:, c + 1 :].baddbmm_(weights[:, c, c + 1 :, None], error[:, None], alpha=-1)
    return rest.mT


def _ratio(x: Tensor, unit: Tensor) -> Tensor:
    """x / unit, 0 where the unit is."""
    return x * torch.where(unit > 0, 1 / unit, torch.zeros_like(unit))


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")


@functools.lru_cache(maxsize=8)
def _balance_file(path: str) -> Balance:
    return Balance.load(path)
