# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""RotateKV (Su et al., arXiv 2501.16383, sections 4.1 to 4.3; code ZunhaiSu/RotateKV).

K before RoPE: 4 consecutive KV heads are joined and multiplied by the Hadamard matrix of 4
head_dim; all channels of all heads are then sorted by their sum of |K| (ascending, one order per
layer) and cut into groups of 128: per (token, group) A_round, range times 0.8 (1 above 2 bits).
K' = RoPE(undo order, undo Hadamard). V: V H per head, per (token, head, 128 channels) A_round, 0.8.
step and zero 16 bit. Bits: b + 32 / group.

Exact tokens ("attention sinks"): the tokens that hold the 20 entries of largest magnitude of the
layer's input (the residual stream, where massive activations live), searched in the prompt once. No
window: every later token is quantised when it is stored.

Choices: the order is measured on K of the prompt (the authors: WikiText-2), which fits better and
uses nothing that is decoded. Where 4 does not divide kv_heads the largest power of two that does is
joined. With `equal_window` the sinks take the place of the outlier tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..codec import LayerCodes, LayerInput
from .common import (
    Baseline,
    Quantised,
    affine_round,
    by_channels,
    channel_group,
    check_bits,
    hadamard,
)

_CLIP_2_BITS = 0.8
_ROPE_TOLERANCE = 0.01


class RotateKV(Baseline):
    """Joined-head rotation and channel order on K before RoPE; outlier tokens stay exact."""

    def __init__(
        self, bits: int = 2, joined: int = 4, outliers: int = 20, equal_window: bool = False
    ) -> None:
        check_bits("bits", bits)
        super().__init__(f"rotatekv{bits}", f"RotateKV-{bits}", equal_window=equal_window)
        self.code_bits, self.joined, self.outliers = bits, joined, outliers
        self.clip = _CLIP_2_BITS if bits == 2 else 1.0

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        """See Codec."""
        bits = self.code_bits + 32 / channel_group(head_dim)
        return bits, bits

    def quantise(self, layer: LayerInput) -> tuple[Quantised, Quantised]:
        """See Baseline. Raises ValueError without a prompt, or RoPE tables that give k."""
        if layer.cos is None or layer.sin is None:
            raise ValueError("cos and sin must be given: RotateKV quantises K before RoPE")
        _check_prompt(layer)
        group = channel_group(layer.k.shape[-1])

        def quantise(x: Tensor) -> Quantised:
            return by_channels(x, group, lambda y: affine_round(y, self.code_bits, clip=self.clip))

        before = layer.k_pre_rope
        before = rope(layer.k, layer.cos, -layer.sin) if before is None else before
        _check_rope(rope(before, layer.cos, layer.sin), layer.k)
        heads = _joined_heads(before.shape[0], self.joined)
        rotated = _rotate_joined(before, heads).transpose(0, 1).flatten(1)  # [tokens, all channels]
        order = rotated[: layer.prompt].abs().sum(0).argsort()
        k = quantise(rotated[:, order][None])
        restored = torch.empty_like(rotated)
        restored[:, order] = k.values[0]
        restored = restored.unflatten(1, layer.k.shape[::2]).transpose(0, 1)
        k.values = rope(_rotate_joined(restored, heads), layer.cos, layer.sin)
        v = quantise(hadamard(layer.v))
        v.values = hadamard(v.values)
        return k, v

    def encode(self, layer: LayerInput) -> LayerCodes:
        """See Codec. Raises ValueError without `hidden`, unless `equal_window` or no outliers."""
        codes = super().encode(layer)
        if self.outliers and not self.equal_window:
            exact = self.outlier_tokens(layer)
            codes.k_packed = codes.k_packed & ~exact
            codes.v_packed = codes.v_packed & ~exact
        return codes

    def outlier_tokens(self, layer: LayerInput) -> Tensor:
        """bool [tokens]: where the largest entries of the prompt's hidden state are."""
        if layer.hidden is None:
            raise ValueError("hidden must be given: RotateKV finds its exact tokens there")
        hidden = layer.hidden[: layer.prompt].abs()
        top = hidden.flatten().topk(min(self.outliers, hidden.numel())).indices
        exact = torch.zeros(layer.tokens, dtype=torch.bool, device=hidden.device)
        exact[top // hidden.shape[1]] = True
        return exact


def _check_prompt(layer: LayerInput) -> None:
    if layer.prompt < 1:
        raise ValueError("prompt must be at least 1 token: the channel order is measured there")


def _check_rope(found: Tensor, k: Tensor) -> None:
    if (found - k).norm() > _ROPE_TOLERANCE * k.norm():
        raise ValueError(
            "cos and sin must be RoPE tables of the pairs (c, c + rope_dim / 2): turned by them, "
            "K before RoPE is not k"
        )


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [heads, tokens, head_dim] with its first rope_dim channels turned; -sin turns them back.

    Pairs are (c, c + rope_dim / 2), as in transformers' Llama. cos, sin: [tokens, rope_dim].
    """
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, rest], -1)


def _joined_heads(kv_heads: int, most: int) -> int:
    return min(kv_heads & -kv_heads, most)


def _rotate_joined(x: Tensor, heads: int) -> Tensor:
    """Hadamard over `heads` joined heads of x [kv_heads, tokens, head_dim]; its own inverse."""
    size = x.shape[-1]
    joined = x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
    return hadamard(joined).unflatten(2, (heads, size)).transpose(1, 2).flatten(0, 1)
