# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""A stress that puts gaps between modalities into the keys, with the exact model as it is.

Keys of images and sounds often have other norms than those of words (arXiv 2605.19660). Here spans
of a text play modalities: a format stores keys a_t k_t, with a_t = factor in "image" spans and
1 / factor in "audio" spans, and its reader divides the score of token t by a_t. In exact arithmetic
nothing has changed, whatever a_t is, and queries stay as they are; a format that shares a range
among tokens of two spans now shares it among norms that differ by up to factor squared.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .codec import Codec, LayerCodes, LayerInput
from .simulate import PackedFormat
from .twin import Twin

KINDS = ("text", "image", "audio")
_SHORTEST, _LONGEST = 16, 96  # tokens of a span: frames between words, not one long image


@dataclass(frozen=True)
class Span:
    """Tokens start..stop-1 of one kind."""

    kind: str
    start: int
    stop: int


def make_spans(tokens: int, seed: int = 0) -> list[Span]:
    """Spans that fill `tokens`, kinds in turn, of random lengths from 16 to 96.

    A longer text has the spans of a shorter one, the last one possibly longer.
    """
    spans: list[Span] = []
    source, start = random.Random(seed), 0
    while start < tokens:
        stop = min(start + source.randint(_SHORTEST, _LONGEST), tokens)
        spans.append(Span(KINDS[len(spans) % len(KINDS)], start, stop))
        start = stop
    return spans


def key_factors(tokens: int, factor: float, seed: int = 0) -> Tensor:
    """a_t of every token, float32 [tokens] on the CPU. ValueError for factor <= 0."""
    if not factor > 0:
        raise ValueError(f"modality stress is {factor}, must be positive")
    by_kind = {"text": 1.0, "image": factor, "audio": 1 / factor}
    factors = torch.empty(tokens)
    for span in make_spans(tokens, seed):
        factors[span.start : span.stop] = by_kind[span.kind]
    return factors


class ModalityStress(Codec):
    """A codec that is given stressed keys; see the module's text.

    inner: any codec; a packed format is taken through its twin, as kernels have no such reader.
    """

    def __init__(self, inner: Codec | PackedFormat, factor: float) -> None:
        self.inner = _twin(inner) if isinstance(inner, PackedFormat) else inner
        self.factor = factor
        self.name, self.label = self.inner.name, self.inner.label
        key_factors(1, factor)  # checks it

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        """The inner codec's."""
        return self.inner.bits(head_dim, kv_heads)

    def encode(self, layer: LayerInput) -> LayerCodes:
        """What the inner codec makes of a_t k_t, divided by a_t again."""
        a = key_factors(layer.tokens, self.factor).to(layer.k.device)[:, None]
        before = layer.k_pre_rope
        stressed = replace(layer, k=layer.k * a, k_pre_rope=None if before is None else before * a)
        codes = self.inner.encode(stressed)
        return replace(codes, k=codes.k / a)


def _twin(packed: PackedFormat) -> Twin:
    twin = Twin(
        k_bits=int(packed.format[1]),
        v_bits=int(packed.format[3]),
        window=packed.window,
        sinks=packed.sinks,
        balance="prompt" if packed.balance == "auto" else packed.balance,
        center="none" if packed.balance == "none" else "prompt",
        feedback="none" if packed.balance == "none" else "prompt",
    )
    twin.name = f"{packed.format}-twin"
    return twin
