# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What the layers of one cache have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..calibration import Calibration
from ..plan import SharedPlans
from .columns import StepMemo


@dataclass
class Shared:
    """What the layers of one cache share."""

    format: str
    window: int
    sinks: int
    measure: bool  # balance="auto"
    strict: bool = False  # position alone decides which copy a query reads
    first: int = 0  # index of the first packed layer
    evidence: float = 1.0  # of the text being measured, by all layers so far (calibration.py)
    given: dict[int, Calibration] = field(default_factory=dict)  # by layer, of a Balance
    keep_pending: bool = False  # later layers read this layer's K and V (KV sharing)
    dequantizations: int = 0
    refused: str = ""  # why a layer refused tokens that earlier layers may hold already
    memo: StepMemo = field(default_factory=StepMemo)
    plans: SharedPlans = field(default_factory=SharedPlans)
