# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""A model family as the tests see it: a tiny random model and inputs for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # arguments of generate(): input_ids, attention_mask, pixel_values, ...


@dataclass
class Built:
    """model: in evaluation mode; cases: what a caller may send it, by name; `long` has at least
    200 tokens, `batch` several padded rows."""

    model: Any
    cases: dict[str, Callable[[], Inputs]]


@dataclass(frozen=True)
class Family:
    """title: as in the table of docs/models.md. make: a model and its cases. cases: those whose
    results must equal the stock cache's. media: what the case "one" holds. stateful: it has
    recurrent layers, with which transformers refuses assisted decoding. positionless: its
    attention knows no positions. refused: part of the message with which enable refuses it."""

    title: str
    make: Callable[[], Built] = field(repr=False)
    cases: tuple[str, ...]
    media: str = "text"
    stateful: bool = False
    positionless: bool = False
    refused: str = ""

    @functools.cached_property
    def built(self) -> Built:
        """Made once, always the same."""
        torch.manual_seed(0)
        made = self.make()
        made.model.eval()
        return made

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.built.model.config.is_encoder_decoder)


def to_tensors(batch: Any) -> Inputs:
    """What a processor returned, without what is not a tensor."""
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def repeated(text: str, count: int) -> str:
    return " ".join([text] * count)
