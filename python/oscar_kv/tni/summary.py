# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""A measurement in words and numbers: findings, tables, JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .constant import constant_findings, constants
from .measure import (
    METRICS,
    QUANTILES,
    Measurement,
    imbalance,
    max_over_median,
    max_over_min,
    relative_norms,
)
from .modality import modalities
from .quantize import COMBINATIONS
from .tokens import OUTLIER_RATIO, Outlier, find_outliers

#: Combinations that a story of the steps needs, and what a reader should know of them.
STORY = {
    "none": "plain per-channel codes",
    "rotation": "rotation only",
    "rotation + scaling": "the paper's two steps",
    "all": "with balance and center: our format",
}
_ROW = {steps.name: row for row, steps in enumerate(COMBINATIONS)}
_METRIC = {name: column for column, name in enumerate(METRICS)}


@dataclass(frozen=True)
class Head:
    """A KV head in a table; imbalance figures are means over its groups."""

    layer: int
    head: int
    imbalance: float
    max_over_min: float
    max_over_median: float
    smallest: float  # norm / group median of the most extreme tokens
    largest: float
    errors: dict[str, float]  # of K: combination -> relative error


def outliers(measured: Measurement, limit: int = 12) -> tuple[list[Outlier], list[Outlier]]:
    """Low-norm and large-norm outliers of a measurement."""
    layers = [layer.layer for layer in measured.layers]
    return find_outliers(measured.ratios(), layers, measured.tokens, limit)


def heads(measured: Measurement) -> list[Head]:
    """Every measured KV head, the most imbalanced first."""
    rows = []
    for layer in measured.layers:
        relative = relative_norms(layer.norms)
        spread, ratio, above = (
            f(layer.norms).mean(-1) for f in (imbalance, max_over_min, max_over_median)
        )
        for head in range(layer.norms.shape[0]):
            errors = layer.errors[:, 0, _METRIC["k"], head]
            rows.append(
                Head(
                    layer=layer.layer,
                    head=head,
                    imbalance=float(spread[head]),
                    max_over_min=float(ratio[head]),
                    max_over_median=float(above[head]),
                    smallest=float(relative[head].min()),
                    largest=float(relative[head].max()),
                    errors={name: float(errors[row]) for name, row in _ROW.items()},
                )
            )
    return sorted(rows, key=lambda row: -row.imbalance)


def error(measured: Measurement, metric: str, combination: str, exact_sinks: bool) -> Tensor:
    """One metric of one combination, [layers, kv_heads]."""
    errors = measured.errors()
    return errors[:, _ROW[combination], int(exact_sinks), _METRIC[metric]]


def token_error(measured: Measurement, combination: str, position: int) -> float:
    """Relative error of one token's K, mean over layers and heads."""
    return float(measured.token_errors()[_ROW[combination], position])


def frequent_texts(measured: Measurement, least: int = 3) -> list[tuple[str, int, float]]:
    """(text, occurrences, norm / group median) of texts that occur `least` times, lowest first.

    The ratio is a geometric mean over occurrences, layers and heads.
    """
    log = measured.ratios().log2().mean((0, 1))
    places: dict[str, list[int]] = {}
    for position, token in enumerate(measured.tokens):
        places.setdefault(token.text, []).append(position)
    rows = [
        (text, len(at), float(log[at].mean().exp2()))
        for text, at in places.items()
        if len(at) >= least
    ]
    return sorted(rows, key=lambda row: row[2])


def findings(measured: Measurement) -> list[str]:
    """What the numbers say, one sentence a finding."""
    low, high = outliers(measured)
    ratios = measured.ratios()
    worst, spread = heads(measured)[0], measured.imbalance()
    sentences = [
        f"Within a group of 32 tokens, key norms spread over {float(spread.mean()):.2f} of their "
        f"median on average; most in layer {worst.layer}, head {worst.head}: {worst.imbalance:.2f}."
    ]
    if low:
        first = low[0]
        sentences.append(
            f"Low-norm tokens exist. The strongest is {first.token.shown()} at position "
            f"{first.position}: {first.ratio:.2f} of its group's median norm in "
            f"{first.share:.0%} of the heads (least: {first.worst:.2f}, layer {first.layer}, "
            f"head {first.head})."
        )
    else:
        sentences.append(
            f"No token's norm is below 1/{OUTLIER_RATIO:.0f} of its group's median (smallest: "
            f"{float(ratios.min()):.2f})."
        )
    if high:
        first = high[0]
        sentences.append(
            f"Large-norm tokens exist. The strongest is {first.token.shown()} at position "
            f"{first.position}: {first.ratio:.1f} times its group's median norm in "
            f"{first.share:.0%} of the heads (most: {first.worst:.1f}, layer {first.layer}, "
            f"head {first.head})."
        )
    else:
        sentences.append(
            f"No token's norm is above {OUTLIER_RATIO:.0f} times its group's median (largest: "
            f"{float(ratios.max()):.2f})."
        )
    sentences += constant_findings(measured)
    return sentences + _kind_findings(measured) + _step_findings(measured)


def _kind_findings(measured: Measurement) -> list[str]:
    kinds = modalities(measured)
    if len(kinds) < 2:
        return []
    low, high = min(kinds, key=lambda one: one.norm), max(kinds, key=lambda one: one.norm)
    mixed, tokens = sum(one.mixed for one in kinds), len(measured.tokens)
    errors = ", ".join(
        f"{one.kind} {one.errors['rotation']:.3f} -> {one.errors['rotation + scaling']:.3f}"
        for one in kinds
    )
    return [
        f"Keys of {high.kind} tokens are {high.norm / low.norm:.1f} times as large as those of "
        f"{low.kind} tokens; {mixed / tokens:.0%} of the tokens share a group with another kind.",
        f"Relative error of K by kind, without and with token scaling: {errors}.",
    ]


def _step_findings(measured: Measurement) -> list[str]:
    def mean(metric: str, name: str, exact_sinks: bool = False) -> float:
        return float(error(measured, metric, name, exact_sinks).mean())

    def path(metric: str) -> str:
        return ", ".join(f"{name} {mean(metric, name):.3f}" for name in STORY)

    paper, balanced = "rotation + scaling", "balance + rotation + scaling"
    without, with_balance = mean("k", paper), mean("k", balanced)
    note = ""
    if with_balance > without and mean("score", balanced) < mean("score", paper):
        note = (
            f" Balance raises the plain error of K ({without:.3f}, with it {with_balance:.3f}) and "
            "lowers that of the scores: it moves error to channels that queries hardly look at."
        )
    sinks = measured.settings.sinks
    return [
        f"Error of the attention output, every old token read packed: {path('output')}. With the "
        f"first {sinks} tokens exact: none {mean('output', 'none', True):.3f}, "
        f"all {mean('output', 'all', True):.3f}.",
        f"Error of the scores: {path('score')}.{note}",
        f"V: relative error {mean('v', 'none'):.3f} without and {mean('v', 'rotation'):.3f} with "
        "rotation.",
    ]


def as_dict(measured: Measurement) -> dict[str, Any]:
    """The content of `--json`: settings, findings, tokens, heads, errors; no per-token norms."""
    low, high = outliers(measured)
    return {
        "model": measured.model,
        **asdict(measured.settings),
        "tokens": len(measured.tokens),
        "layers": [layer.layer for layer in measured.layers],
        "findings": findings(measured),
        "heads": [asdict(head) for head in heads(measured)],
        "constants": [asdict(head) for head in constants(measured)],
        "norm_quantiles": {
            str(layer.layer): dict(
                zip(map(str, QUANTILES), layer.quantiles().T.tolist(), strict=True)
            )
            for layer in measured.layers
        },
        "low_norm_tokens": [_flat(one) for one in low],
        "large_norm_tokens": [_flat(one) for one in high],
        "kinds": [asdict(kind) for kind in modalities(measured)],
        "errors": [
            {"steps": name, "exact_sinks": exact}
            | {metric: float(error(measured, metric, name, exact).mean()) for metric in METRICS}
            for name in _ROW
            for exact in (False, True)
        ],
    }


def _flat(outlier: Outlier) -> dict[str, Any]:
    row = asdict(outlier)
    return row | row.pop("token")
