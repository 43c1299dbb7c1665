# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The packed format with each step before quantisation on or off.

The arithmetic is that of the format's torch twin: with all steps on it reads as the packed cache
without error feedback, so an error reported for "without X" differs from that by X alone. Balance
and center are applied here, before the twin, since it would measure its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..calibration import GROUP_TOKENS, Calibration
from ..eval.codec import LayerInput
from ..eval.twin import Twin
from ..rotate import channel_signs, hadamard


@dataclass(frozen=True)
class Steps:
    """What is done to K before it is quantised. V knows the rotation only.

    center: the constant part of heads that have one is taken off.
    """

    balance: bool
    rotation: bool
    scaling: bool
    center: bool = False

    @property
    def name(self) -> str:
        """Such as "balance + rotation"; "none"; "all"."""
        on = [field.name for field in fields(self) if getattr(self, field.name)]
        return {0: "none", 4: "all"}.get(len(on), " + ".join(on))


#: Every combination of the first three, from none on; then all four.
COMBINATIONS = [
    *sorted(
        (Steps(*flags) for flags in itertools.product((False, True), repeat=3)),
        key=lambda steps: (steps.balance + steps.rotation + steps.scaling, steps.scaling),
    ),
    Steps(balance=True, rotation=True, scaling=True, center=True),
]


def format_bits(format: str) -> tuple[int, int]:
    """(bits of a K code, bits of a V code) of a format such as "k4v2"; ValueError for others."""
    from .. import _core

    if format not in _core.formats():
        raise ValueError(f"format is {format!r}, must be one of {', '.join(_core.formats())}")
    return int(format[1]), int(format[3])


def transform(k: Tensor, steps: Steps, calibration: Calibration) -> Tensor:
    """K [kv_heads, tokens, head_dim] as the quantiser gets it, norms of rows factored out exactly.

    Where the calibration has no balance or no center, that step changes nothing.
    """
    factor, offset = _factor_and_offset(steps, calibration)
    y = (k - offset) / factor
    if steps.rotation:
        y = hadamard(y * channel_signs(k.shape[-1]))
    if steps.scaling:
        rms = y.square().mean(-1, keepdim=True).sqrt()
        y = torch.where(rms > 0, y / rms, 0.0)
    return y


def _factor_and_offset(steps: Steps, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """What K is divided by and what is taken off it before, for [kv_heads, tokens, head_dim]."""
    balance, center = calibration.balance, calibration.center
    factor = balance[:, None] if steps.balance and balance is not None else torch.ones(1)
    offset = center[:, None] if steps.center and center is not None else torch.zeros(1)
    return factor, offset


def read_packed(
    k: Tensor, v: Tensor, steps: Steps, calibration: Calibration, format: str
) -> tuple[Tensor, Tensor]:
    """What a reader of packed K and V gets, in the basis of k and v.

    k, v: float32 [kv_heads, tokens, head_dim], tokens a multiple of 32 (else ValueError); groups
    from the first token on. Without token scaling all norms are 1; without rotation the quantiser
    sees the plain channels. Feedback of the calibration is not used.
    """
    tokens = k.shape[1]
    if tokens % GROUP_TOKENS:
        raise ValueError(f"tokens is {tokens}, must be a multiple of {GROUP_TOKENS}")
    k_bits, v_bits = format_bits(format)
    twin = Twin(
        k_bits=k_bits,
        v_bits=v_bits,
        norm="head" if steps.scaling else "none",
        balance="none",  # given, as the center: both are applied here
        center="none",
        rotate=int(steps.rotation),
        feedback="none",
    )
    factor, offset = _factor_and_offset(steps, calibration)
    plain = (k - offset) / factor
    codes = twin.encode(LayerInput(layer=0, prompt=tokens, q=k[:0], k=plain, v=v))
    return codes.k * factor + offset, codes.v
