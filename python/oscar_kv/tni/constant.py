# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The constant part of keys, head by head: how large it is, and what its center mends.

Large biases of the key projection make keys mostly a constant. measure.py defines the figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration import CENTER_RATIO
from .measure import METRICS, Measurement
from .quantize import COMBINATIONS

#: Mid step / range from which codes are widened by a third (half of that on average).
COARSE = 0.3
#: Of a table of heads.
COLUMNS = (
    "layer",
    "KV head",
    "|c| / rest",
    "center",
    "mid step / range",
    "with center",
    "score error",
    "with center",
)
_WITHOUT, _WITH = (
    [steps.name for steps in COMBINATIONS].index(name)
    for name in ("balance + rotation + scaling", "all")
)
_SCORE = list(METRICS).index("score")


@dataclass(frozen=True)
class Constant:
    """A KV head. ratio: |c| over the rest; centered: whether packing takes c off; mid_step: mid
    step / range, score_error: of tokens that are read packed (nats), both before the center and
    after."""

    layer: int
    head: int
    ratio: float
    centered: bool
    mid_step: tuple[float, float]
    score_error: tuple[float, float]

    def cells(self) -> list[str]:
        """A row of a table with COLUMNS."""
        figures = [f"{x:.2f}" for x in (*self.mid_step, *self.score_error)]
        center = "yes" if self.centered else "no"
        return [str(self.layer), str(self.head), f"{self.ratio:.1f}", center, *figures]


def constants(measured: Measurement) -> list[Constant]:
    """Every measured KV head, those with the coarsest mids before the center first."""
    rows = []
    for layer in measured.layers:
        before, after = layer.mid_steps.tolist()
        errors = layer.errors[:, 0, _SCORE]
        for head, centered in enumerate(layer.centered().tolist()):
            rows.append(
                Constant(
                    layer=layer.layer,
                    head=head,
                    ratio=float(layer.constant[head]),
                    centered=centered,
                    mid_step=(before[head], after[head]),
                    score_error=(float(errors[_WITHOUT, head]), float(errors[_WITH, head])),
                )
            )
    return sorted(rows, key=lambda row: -row.mid_step[0])


def constant_findings(measured: Measurement) -> list[str]:
    """How many heads have a center and what it does, or that none has; which mids stay coarse."""
    rows = constants(measured)
    chosen = [row for row in rows if row.centered]
    most = max(chosen or rows, key=lambda row: row.ratio)
    where = f"{most.ratio:.1f} times the rest, layer {most.layer}, head {most.head}"
    if chosen:

        def path(name: str) -> str:
            both = zip(*(getattr(row, name) for row in chosen), strict=True)
            return " to ".join(f"{sum(side) / len(side):.3f}" for side in both)

        sentence = (
            f"Keys of {len(chosen)} of {len(rows)} heads are mostly a constant (largest: {where}), "
            f"which their center takes off: the step of their mids falls from {path('mid_step')} "
            f"of a channel's range, the error of their scores from {path('score_error')} (means "
            "over these heads)."
        )
    else:
        sentence = (
            f"No head has a center: the constant part of keys is at most {where} (a center takes "
            f"more than {CENTER_RATIO:.0f}, on a text that varies)."
        )
    coarse = [row for row in rows if row.mid_step[1] > COARSE]
    if not coarse:
        return [sentence]
    worst = max(coarse, key=lambda row: row.mid_step[1])
    return [
        sentence,
        f"In {len(coarse)} of {len(rows)} heads mids are coarse as packed: their step is above "
        f"{COARSE} of a channel's range (most: {worst.mid_step[1]:.2f}, layer {worst.layer}, head "
        f"{worst.head}).",
    ]
