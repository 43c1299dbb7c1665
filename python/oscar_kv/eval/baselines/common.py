# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What the baselines share: quantisers, the Hadamard transform, window rules.

Conventions, the same for every baseline:

* float32 arithmetic; scales and zeros are rounded to their storage type before dequantising, codes
  are computed with the unrounded ones; rounding is half to even.
* The prompt is prefilled exactly. A decoded query reads its own token exactly, also where a method
  has no window (an engine has that token at hand; it can only help the method). Everything before
  it is read as the method's cache holds it after those tokens were stored.
* Tensors are made on the device of LayerInput.k. Random ones are drawn on the CPU and moved, so
  that they are the same on every device.
* Groups of channels: 128 where the authors work at head_dim 128; a head_dim that is no multiple of
  128 (64, 96) is one group. That costs more bits than 128 would, and `bits` counts them.
* Token groups are formed from the first token after the sinks; a group that is not complete stays
  exact. Authors' sinks and windows unless `equal_window`: then 4 sinks, and 32 exact tokens on top
  of the open group of 32 tokens, as in our format. A method whose token group is larger (OTT,
  KVarN: 128) keeps it, and so has more exact tokens than ours, never fewer.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codec import Codec, LayerCodes, LayerInput

EQUAL_SINKS = 4
EQUAL_WINDOW = 32
EQUAL_GROUP = 32
CHANNEL_GROUP = 128


@dataclass
class Quantised:
    """A quantised tensor: what it reads as, and every array that a cache would store.

    values: float32, dequantised. codes: one small integer an element. code_bits: bits of a code, a
    number, or one per channel (last axis). metadata: scales, zeros, norms in their storage dtypes.
    """

    values: Tensor
    codes: Tensor
    code_bits: float
    metadata: tuple[Tensor, ...]

    @property
    def stored_bits(self) -> float:
        """Bits of all stored arrays."""
        meta = sum(8 * m.element_size() * m.numel() for m in self.metadata)
        return self.code_bits * self.codes.numel() + meta


def affine_float(
    x: Tensor, bits: int, dim: int = -1, dtype: torch.dtype = torch.float16
) -> Quantised:
    """A_float: step = (max - min) / (2^bits - 1), code = rint((x - min) / step).

    x' = code step + min. The group is axis `dim`; step and min are stored in `dtype`. A constant
    group reads as its min.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    top = 2**bits - 1
    step = (high - low) / top
    codes = ((x - low) / torch.where(step > 0, step, 1)).round_().clamp_(0, top)
    scale, zero = step.to(dtype), low.to(dtype)
    return Quantised(codes * scale.float() + zero.float(), codes.byte(), bits, (scale, zero))


def affine_round(
    x: Tensor, bits: int, dim: int = -1, clip: float = 1.0, dtype: torch.dtype = torch.float16
) -> Quantised:
    """A_round: step = clip (max - min) / (2^bits - 1), z = rint(-clip min / step),
    code = clamp(rint(x / step) + z), x' = code step + zero with zero = -z step.

    z is not clamped to the range of codes. step and zero are stored in `dtype`. A constant group
    reads as its min.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    top = 2**bits - 1
    step = clip * (high - low) / top
    alive = step > 0
    divisor = torch.where(alive, step, 1)
    shift = (-clip * low / divisor).round_()
    codes = ((x / divisor).round_() + shift).clamp_(0, top)
    codes = torch.where(alive, codes, 0)
    scale, zero = step.to(dtype), torch.where(alive, -shift * step, low).to(dtype)
    return Quantised(codes * scale.float() + zero.float(), codes.byte(), bits, (scale, zero))


def symmetric(
    x: Tensor, bits: int, dim: int = -1, clip: float = 1.0, dtype: torch.dtype = torch.float16
) -> Quantised:
    """S: step = clip max|x| / (2^(bits-1) - 1), code = clamp(rint(x / step)), x' = code step.

    Codes are -2^(bits-1) .. 2^(bits-1) - 1; an all-zero group reads as zero.
    """
    half = 2 ** (bits - 1)
    step = clip * x.abs().amax(dim, keepdim=True) / (half - 1)
    codes = (x / torch.where(step > 0, step, 1)).round_().clamp_(-half, half - 1)
    scale = step.to(dtype)
    return Quantised(codes * scale.float(), codes.to(torch.int8), bits, (scale,))


@functools.cache
def hadamard_matrix(size: int, device: torch.device | None = None) -> Tensor:
    """Orthonormal symmetric Sylvester matrix; block-diagonal where size is no power of two.

    float32 [size, size] on `device` (None: the CPU); a block is the largest power of two that
    divides size.
    """
    block = size & -size
    h = torch.ones(1, 1, device=device or "cpu")
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return torch.block_diag(*[h / math.sqrt(block)] * (size // block))


def hadamard(x: Tensor) -> Tensor:
    """x H along the last axis; applied twice it is the identity."""
    return x @ hadamard_matrix(x.shape[-1], x.device)


def channel_group(head_dim: int) -> int:
    """Channels of a group where the authors have 128: see the conventions above."""
    return head_dim if head_dim % CHANNEL_GROUP else CHANNEL_GROUP


def by_channels(x: Tensor, group: int, quantise: Callable[[Tensor], Quantised]) -> Quantised:
    """Quantises x [heads, tokens, head_dim] per token, in groups of `group` channels (axis -1)."""
    found = quantise(x.unflatten(-1, (-1, group)))
    found.values, found.codes = found.values.flatten(-2), found.codes.flatten(-2)
    return found


def by_tokens(
    x: Tensor, start: int, group: int, quantise: Callable[[Tensor], Quantised]
) -> Quantised:
    """Quantises x [heads, tokens, head_dim] in groups of `group` tokens from `start` on.

    `quantise` gets [heads, groups, group, head_dim]. Tokens outside complete groups keep their
    values; codes and metadata are those of the complete groups.
    """
    count = max(0, x.shape[1] - start) // group
    if count == 0:
        return Quantised(x.clone(), torch.empty(0, dtype=torch.uint8, device=x.device), 0, ())
    found = quantise(x[:, start : start + count * group].unflatten(1, (count, group)))
    values = x.clone()
    values[:, start : start + count * group] = found.values.flatten(1, 2)
    found.values = values
    return found


def flushed(position: Tensor, residual: int, start: int = 0) -> Tensor:
    """First exact token of each query where a residual is packed whole once it is full."""
    return start + (position - start).clamp(min=0) // residual * residual


def windowed(position: Tensor, window: int, group: int, start: int = 0) -> Tensor:
    """First exact token where whole groups are packed that end `window` tokens before the newest.

    The query's own token is one of the `window`.
    """
    return start + (position + 1 - window - start).clamp(min=0) // group * group


def packed_below(layer: LayerInput, limit: Tensor, sinks: int) -> Tensor:
    """Mask bool [1, queries, tokens]: tokens sinks .. limit[query] - 1 are packed."""
    token = torch.arange(layer.tokens, device=limit.device)
    return ((token >= sinks) & (token < limit[:, None]))[None]


def check_bits(name: str, value: int, least: int = 1) -> None:
    """Raises ValueError unless value is a number of bits that a code may have."""
    if not least <= value <= 8:
        raise ValueError(f"{name} must be in {least}..8, got {value}")


def check_divides(name: str, part: int, whole_name: str, whole: int) -> None:
    """Raises ValueError unless part is positive and divides whole."""
    if part < 1 or whole % part:
        raise ValueError(f"{name} must divide {whole_name} = {whole}, got {part}")


class Baseline(Codec):
    """A codec that packs a prefix of the tokens, apart from sinks, as most published methods do.

    Subclasses say what the packed copy reads as (`quantise`) and up to which token a query reads it
    by the authors' rules (`limits`).
    """

    def __init__(
        self,
        name: str,
        label: str,
        sinks: int = 0,
        token_group: int = 1,
        equal_window: bool = False,
    ) -> None:
        self.name = f"{name}-eq" if equal_window else name
        self.label = f"{label} s{EQUAL_SINKS} w{EQUAL_WINDOW}" if equal_window else label
        self.equal_window = equal_window
        self.sinks = EQUAL_SINKS if equal_window else sinks
        self.token_group = token_group

    @abc.abstractmethod
    def quantise(self, layer: LayerInput) -> tuple[Quantised, Quantised]:
        """K and V, values in the original basis [kv_heads, tokens, head_dim]."""

    def limits(self, position: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """First exact token of K and of V for the queries at `position` (int64 [queries]).

        Here: no window, all tokens before the query are packed.
        """
        return position, position

    def masks(self, layer: LayerInput) -> tuple[Tensor, Tensor]:
        """Masks of K and V, bool [1, queries, tokens]."""
        position = torch.arange(layer.prompt, layer.tokens, device=layer.k.device)
        if self.equal_window:
            group = max(EQUAL_GROUP, self.token_group)
            both = windowed(position, EQUAL_WINDOW, group, self.sinks)
            limits = (both, both)
        else:
            limits = self.limits(position, layer.prompt)
        k, v = (packed_below(layer, limit, self.sinks) for limit in limits)
        return k, v

    def encode(self, layer: LayerInput) -> LayerCodes:
        """See Codec."""
        k, v = self.quantise(layer)
        k_packed, v_packed = self.masks(layer)
        return LayerCodes(k.values, v.values, k_packed, v_packed)
