# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt stand for images, videos or sounds, and what that does to keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..calibration import GROUP_TOKENS
from .measure import Measurement
from .quantize import COMBINATIONS

KINDS = ("image", "video", "audio")


@dataclass(frozen=True)
class Modality:
    """The tokens of one kind. norm: their key norm over the median norm of all tokens of the head,
    median over heads; errors: relative error of their K by combination of steps, mean over tokens,
    layers and heads; mixed: how many of them share a group of 32 with another kind."""

    kind: str
    tokens: int
    norm: float
    mixed: int
    errors: dict[str, float]


def token_kinds(config: Any, ids: Sequence[int]) -> list[str]:
    """ "image", "video", "audio" or "text" for each token id of a prompt.

    Processors repeat a placeholder id once for every token that an image or a sound becomes;
    config: the model's, which names those ids (``image_token_id`` or ``image_token_index``).
    """
    config = getattr(config, "thinker_config", None) or config
    kind_of = {}
    for kind in KINDS:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if isinstance(getattr(config, name, None), int):
                kind_of[getattr(config, name)] = kind
    return [kind_of.get(int(one), "text") for one in ids]


def modalities(measured: Measurement) -> list[Modality]:
    """The kinds of tokens of a measurement, in the order in which they come."""
    kinds = [token.kind for token in measured.tokens]
    norms = torch.stack([layer.norms for layer in measured.layers])
    overall = norms.median(-1).values
    errors = measured.token_errors()
    groups = [kinds[i : i + GROUP_TOKENS] for i in range(0, len(kinds), GROUP_TOKENS)]
    rows = []
    for kind in dict.fromkeys(kinds):
        chosen = torch.tensor([one == kind for one in kinds])
        ratio = norms[..., chosen].median(-1).values / overall
        means = errors[:, chosen].mean(-1).tolist()
        rows.append(
            Modality(
                kind=kind,
                tokens=int(chosen.sum()),
                norm=float(ratio.median()),
                mixed=sum(group.count(kind) for group in groups if len(set(group)) > 1),
                errors={steps.name: mean for steps, mean in zip(COMBINATIONS, means, strict=True)},
            )
        )
    return rows
