# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured of one layer: norms, imbalance, ranges, constant parts, errors by step.

The paper (arXiv 2605.19660) shows token norms and bounds a group's error by their range in the
group. Our measure of imbalance is that range without its unit: per group of 32 tokens
``(max norm - min norm) / median norm``; beside it stand max / min and max / median. Groups start at
the first token of the sequence, as in the cache; tokens after the last complete group are not
packed and not measured.

The constant part of a head's keys is their mean c, measured as |c| over the root mean square length
of the rest of a key. What it costs is the step of the mids: a group stores its channels' mids in
steps of the largest |mid| / 31, and a mid is off by up to half a step, so that the codes of a
channel must span its range and a step (docs/format.md). Hence "mid step / range": that step over
the median range (max - min) of the group's channels, mean over groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibration import (
    GROUP_TOKENS,
    Calibration,
    QueryStatistics,
    calibrate_layer,
    center_ratio,
    evidence,
)
from .quantize import COMBINATIONS, Steps, format_bits, read_packed, transform
from .tokens import Token

#: The third axis of `errors`, in order.
METRICS = {
    "k": "K, relative error",
    "v": "V, relative error",
    "score": "scores, root mean square error (nats)",
    "output": "attention output, relative error",
}
#: What K looks like to the quantiser, from the plain channels on.
STAGES = {
    "as it comes": Steps(False, False, False),
    "balanced": Steps(True, False, False),
    "balanced, rotated": Steps(True, True, False),
    "as packed (centered and token-scaled too)": Steps(True, True, True, True),
}
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
_SCALING = (Steps(False, True, False), Steps(False, True, True))  # of scaling_errors
_LEAST = 1e-8  # of a group's largest norm: what stands for 0, so that ratios stay finite
_MID_STEPS = 31  # of a K mid: 6 bits with a sign


@dataclass(frozen=True)
class Settings:
    """What the errors are measured for: format, exact window and exact first tokens of the cache.

    queries: positions, evenly spaced over the second half, whose scores and outputs are compared.
    """

    format: str = "k2v2"
    window: int = 32
    sinks: int = 4
    queries: int = 64

    def __post_init__(self) -> None:
        format_bits(self.format)
        for name, low, high in (
            ("window", 0, None),
            ("sinks", 0, GROUP_TOKENS),
            ("queries", 1, None),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                limit = f"{low} or more" if high is None else f"{low} to {high}"
                raise ValueError(f"{name} is {value}, must be {limit}")


@dataclass
class LayerTensors:
    """Q, K and V of one layer for one sequence, after RoPE, as the cache gets them.

    q [q_heads, tokens, head_dim]; k, v [kv_heads, tokens, head_dim]; scale of the scores, None for
    head_dim^-0.5; softcap of the scores (0: none); sink_logits [q_heads] of models that have them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    softcap: float = 0.0
    sink_logits: Tensor | None = None


@dataclass
class LayerMeasure:
    """Everything measured of a layer; tensors are float32 on the CPU.

    norms [kv_heads, tokens]: L2 norms of K over complete groups. ranges [stage, kv_heads,
    head_dim]: mean over groups of (max - min) of a channel, over the rms of the head's values.
    errors [combination, 2, metric, kv_heads]: axis 1 is 0 with every packed token read packed, 1
    with the first `sinks` tokens read exactly. token_errors [combination, tokens]: relative error
    of each token's K, mean over heads. scaling_errors float16 [2, kv_heads, tokens]: the same by
    head for the paper's steps, rotation without and with token scaling. constant [kv_heads]: |c|
    over the rest, at most 1e8. mid_steps [2, kv_heads]: mid step / range of balanced, rotated keys
    over their norms, before the center and after. calibration: what was used, without feedback.
    """

    layer: int
    norms: Tensor
    ranges: Tensor
    errors: Tensor
    token_errors: Tensor
    scaling_errors: Tensor
    constant: Tensor
    mid_steps: Tensor
    calibration: Calibration

    def centered(self) -> Tensor:
        """Which heads have a center, bool [kv_heads]."""
        center = self.calibration.center
        return torch.zeros(len(self.norms)).bool() if center is None else center.any(-1)

    def quantiles(self) -> Tensor:
        """QUANTILES of the norms: [kv_heads, 7]."""
        return torch.quantile(self.norms, torch.tensor(QUANTILES), dim=1).T


@dataclass
class Measurement:
    """A model on a text: `tokens` of the complete groups, `layers` in order."""

    model: str
    settings: Settings
    tokens: list[Token]
    layers: list[LayerMeasure] = field(default_factory=list)

    def ratios(self) -> Tensor:
        """norm / median norm of its group, [layers, kv_heads, tokens]."""
        return torch.stack([relative_norms(layer.norms) for layer in self.layers])

    def imbalance(self) -> Tensor:
        """(max - min) / median of each group's norms, [layers, kv_heads, groups]."""
        return torch.stack([imbalance(layer.norms) for layer in self.layers])

    def errors(self) -> Tensor:
        """[layers, combination, 2, metric, kv_heads]."""
        return torch.stack([layer.errors for layer in self.layers])

    def token_errors(self) -> Tensor:
        """Relative error of each token's K, mean over layers and heads, [combination, tokens]."""
        return torch.stack([layer.token_errors for layer in self.layers]).mean(0)


def _grouped(norms: Tensor) -> Tensor:
    return norms.unflatten(-1, (-1, GROUP_TOKENS))


def _median(groups: Tensor) -> Tensor:
    """Median with the mean of the two middle ones, kept above 0."""
    middle = groups.sort(-1).values[..., GROUP_TOKENS // 2 - 1 : GROUP_TOKENS // 2 + 1].mean(-1)
    return torch.where(middle > 0, middle, 1.0)


def relative_norms(norms: Tensor) -> Tensor:
    """norms [..., tokens] over the median of their group of 32, at least 1e-8 of its largest."""
    groups = _grouped(norms)
    floor = _LEAST * groups.amax(-1, keepdim=True)
    relative = torch.maximum(groups, floor) / _median(groups)[..., None]
    return torch.where(floor > 0, relative, 1.0).flatten(-2)


def imbalance(norms: Tensor) -> Tensor:
    """(max - min) / median of each group of 32, [..., groups] of norms [..., tokens]."""
    groups = _grouped(norms)
    return (groups.amax(-1) - groups.amin(-1)) / _median(groups)


def max_over_min(norms: Tensor) -> Tensor:
    """Largest over smallest norm of each group, at most 1e8, [..., groups]."""
    groups = _grouped(relative_norms(norms))
    return groups.amax(-1) / groups.amin(-1)


def max_over_median(norms: Tensor) -> Tensor:
    """Largest over median norm of each group, [..., groups]."""
    return _grouped(relative_norms(norms)).amax(-1)


def measured_calibration(tensors: LayerTensors, most: float = 1.0) -> tuple[Calibration, float]:
    """What the cache would measure on this prompt, and the evidence of the text for it.

    most: the evidence of the layers before; a layer has no more than those.
    """
    q, k, v = (x.float().transpose(0, 1) for x in (tensors.q, tensors.k, tensors.v))
    seen = QueryStatistics()
    seen.observe(q)
    weight = min(most, evidence([v]))
    return calibrate_layer([k], seen, weight) or Calibration(), weight


def channel_ranges(k: Tensor, calibration: Calibration) -> Tensor:
    """LayerMeasure.ranges of k [kv_heads, tokens, head_dim]: what sets the quantiser's steps."""
    stages = []
    for steps in STAGES.values():
        y = transform(k, steps, calibration)
        groups = y.unflatten(1, (-1, GROUP_TOKENS))
        spread = (groups.amax(2) - groups.amin(2)).mean(1)
        rms = y.square().mean((1, 2)).sqrt()[:, None]
        stages.append(torch.where(rms > 0, spread / rms, 0.0))
    return torch.stack(stages)


def mid_steps(k: Tensor, calibration: Calibration) -> Tensor:
    """LayerMeasure.mid_steps of k [kv_heads, tokens, head_dim]."""
    found = []
    for center in (False, True):
        y = transform(k, Steps(True, True, False, center), calibration)
        rms = y.square().mean(-1, keepdim=True).sqrt()
        # As norms are stored: where the constant is large, what their rounding leaves of it is a
        # good part of a channel's range.
        norm = torch.exp2(torch.round(8 * rms.log2()) / 8)
        groups = torch.where(rms > 0, y / norm, 0.0).unflatten(1, (-1, GROUP_TOKENS))
        low, high = groups.amin(2), groups.amax(2)
        step = (0.5 * (high + low)).abs().amax(-1) / _MID_STEPS
        width = (high - low).quantile(0.5, dim=-1)
        found.append(_ratio(step, width).mean(-1))
    return torch.stack(found)


def _ratio(x: Tensor, unit: Tensor) -> Tensor:
    """x / unit, at most 1e8; 0 where both are."""
    return torch.where(x > 0, (x / unit).clamp(max=1 / _LEAST), 0.0)


def measure_layer(
    layer: int, tensors: LayerTensors, settings: Settings, calibration: Calibration | None = None
) -> LayerMeasure:
    """Measures a layer; without a calibration it is measured on these tensors.

    Raises ValueError for fewer than 32 tokens and for K or V that are not finite.
    """
    tokens = tensors.k.shape[1] // GROUP_TOKENS * GROUP_TOKENS
    if tokens == 0:
        raise ValueError(f"{tensors.k.shape[1]} tokens, at least {GROUP_TOKENS} are needed")
    q, k, v = (x[:, :tokens].float() for x in (tensors.q, tensors.k, tensors.v))
    if not bool(torch.isfinite(k).all() and torch.isfinite(v).all()):
        raise ValueError(f"layer {layer}: K or V is not finite")
    if calibration is None:
        calibration, _ = measured_calibration(tensors)
    calibration = replace(calibration, feedback=None)
    attention = _Attention(tensors, q, k, v, settings)
    errors = torch.zeros(len(COMBINATIONS), 2, len(METRICS), k.shape[0])
    token_errors = torch.zeros(len(COMBINATIONS), tokens)
    scaling_errors = torch.zeros(2, *k.shape[:2], dtype=torch.float16)
    for row, steps in enumerate(COMBINATIONS):
        read_k, read_v = read_packed(k, v, steps, calibration, settings.format)
        by_token = _relative(k, read_k)
        token_errors[row] = by_token.mean(0)
        if steps in _SCALING:
            scaling_errors[_SCALING.index(steps)] = by_token
        for column, sinks in enumerate((0, settings.sinks)):
            mixed_k, mixed_v = _exact_below(sinks, read_k, k), _exact_below(sinks, read_v, v)
            errors[row, column] = torch.stack(
                [
                    _relative(k.flatten(1), mixed_k.flatten(1)),
                    _relative(v.flatten(1), mixed_v.flatten(1)),
                    *attention.errors(mixed_k, mixed_v, sinks),
                ]
            )
    return LayerMeasure(
        layer=layer,
        norms=torch.linalg.vector_norm(k, dim=-1),
        ranges=channel_ranges(k, calibration),
        errors=errors,
        token_errors=token_errors,
        scaling_errors=scaling_errors,
        constant=center_ratio([k.transpose(0, 1)])[1].clamp(max=1 / _LEAST),
        mid_steps=mid_steps(k, calibration),
        calibration=calibration,
    )


def _exact_below(count: int, read: Tensor, exact: Tensor) -> Tensor:
    return torch.cat([exact[:, :count], read[:, count:]], 1)


def _relative(exact: Tensor, read: Tensor) -> Tensor:
    """||read - exact|| / ||exact|| over the last dimension, 0 where exact is 0."""
    size = torch.linalg.vector_norm(exact, dim=-1)
    error = torch.linalg.vector_norm(read - exact, dim=-1)
    return torch.where(size > 0, error / size, 0.0)


class _Attention:
    """Scores and outputs of sampled queries, with exact and with packed K and V.

    A query at position p reads tile g packed if 32 (g + 1) <= p + 1 - window (docs/format.md).
    """

    def __init__(
        self, tensors: LayerTensors, q: Tensor, k: Tensor, v: Tensor, settings: Settings
    ) -> None:
        tokens = k.shape[1]
        count = min(settings.queries, tokens - tokens // 2)
        self.positions = torch.linspace(tokens // 2, tokens - 1, count).round().long()
        self.group = q.shape[0] // k.shape[0]
        self.q = q[:, self.positions].unflatten(0, (-1, self.group))
        self.k, self.v = k, v
        self.scale = q.shape[-1] ** -0.5 if tensors.scale is None else tensors.scale
        self.softcap = tensors.softcap
        logits = tensors.sink_logits
        self.sink_logits = (
            None if logits is None else logits.detach().float().cpu().view(-1, self.group, 1, 1)
        )
        at = torch.arange(tokens)
        end = (at // GROUP_TOKENS + 1) * GROUP_TOKENS
        self.visible = at <= self.positions[:, None]
        self.packed = end <= self.positions[:, None] + 1 - settings.window
        self.exact_scores = self._scores(k)
        self.exact_output = self._output(self.exact_scores, v, v, self.packed)

    def _scores(self, k: Tensor) -> Tensor:
        """[kv_heads, group, queries, tokens]."""
        scores = self.q @ k[:, None].transpose(-1, -2) * self.scale
        return self.softcap * (scores / self.softcap).tanh() if self.softcap else scores

    def _output(self, scores: Tensor, read: Tensor, exact: Tensor, packed: Tensor) -> Tensor:
        scores = scores.masked_fill(~self.visible, float("-inf"))
        if self.sink_logits is not None:
            extra = self.sink_logits.expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, extra], -1)
        weights = scores.softmax(-1)[..., : packed.shape[-1]]
        return (weights * packed) @ read[:, None] + (weights * ~packed) @ exact[:, None]

    def errors(self, read_k: Tensor, read_v: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
        """(rms of the scores' errors on packed tokens, relative error of the output): [kv_heads].

        read_k and read_v are exact below `sinks`; those tokens do not count in the scores' error.
        """
        packed = self.packed.clone()
        packed[:, :sinks] = False
        scores = torch.where(packed, self._scores(read_k), self.exact_scores)
        difference = (scores - self.exact_scores).square().sum((1, 2, 3))
        pairs = int(packed.sum()) * self.group
        output = self._output(scores, read_v, self.v, packed)
        exact = self.exact_output.flatten(1)
        return (difference / max(pairs, 1)).sqrt(), _relative(exact, output.flatten(1))
