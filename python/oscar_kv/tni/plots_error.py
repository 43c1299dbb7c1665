# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report about quantisation: channel ranges, errors by step, layer and group."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration import CENTER_RATIO, GROUP_TOKENS
from .constant import COARSE
from .measure import METRICS, STAGES, Measurement
from .plots import layer_ticks, new_figure, plain_log_axis
from .quantize import COMBINATIONS
from .summary import STORY, error
from .tokens import OUTLIER_RATIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PACKED, _EXACT = "#c1652f", "#3a7ca5"
_MAX_POINTS = 6000  # of a scatter plot
_LEAST_POINTS = 5  # of a median
_LEAST_SHOWN = 1e-3  # on a logarithmic axis: what stands for 0
_STAGE_COLORS = ("0.35", "#d08c1f", "#7a5fa8", "#1b7f5c")


def channel_ranges(measured: Measurement) -> Figure:
    """Range of every channel within a group at each stage, for the most uneven head and a typical.

    Ranges are in units of the head's rms: a flat low line wastes none of the four codes.
    """
    ranges = torch.stack([layer.ranges for layer in measured.layers])  # layer, stage, head, channel
    uneven = (ranges[:, 0].amax(-1) / ranges[:, 0].median(-1).values.clamp(min=1e-8)).flatten()
    order = uneven.argsort(descending=True).tolist()
    kv_heads = ranges.shape[2]
    figure = new_figure(12, 4)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, index, why in (
        (axes[0], order[0], "most uneven channels"),
        (axes[1], order[len(order) // 2], "a typical head"),
    ):
        row, head = divmod(index, kv_heads)
        for stage, (name, color) in enumerate(zip(STAGES, _STAGE_COLORS, strict=True)):
            values = ranges[row, stage, head]
            axis.plot(values.numpy(), color=color, linewidth=1.3, label=name)
        axis.set(
            title=f"layer {measured.layers[row].layer}, KV head {head}: {why}",
            xlabel="channel",
        )
        plain_log_axis(axis)
    axes[0].set_ylabel("range in a group / rms of the head")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def constant_parts(measured: Measurement) -> Figure:
    """Every head by layer: |c| over the rest, and the step of its mids before the center and after.

    Heads with a center are drawn larger, a line joining before and after.
    """
    ratio = torch.stack([layer.constant for layer in measured.layers])
    steps = torch.stack([layer.mid_steps for layer in measured.layers], 1)
    centered = torch.stack([layer.centered() for layer in measured.layers])
    layers, kv_heads = ratio.shape
    offset = 0.7 * ((torch.arange(kv_heads) + 0.5) / kv_heads - 0.5)
    x = torch.arange(layers)[:, None] + offset
    figure = new_figure(12, 4)
    left, right = figure.subplots(1, 2)
    sizes = torch.where(centered, 45, 9).numpy()
    left.scatter(x.numpy(), ratio.clamp(min=_LEAST_SHOWN).numpy(), sizes, _PACKED)
    left.axhline(CENTER_RATIO, color="0.4", linestyle="--", linewidth=1)
    left.set(title="|c| / rest (line: from here on a head has a center)")
    before, after = steps.clamp(min=_LEAST_SHOWN)
    ends = torch.stack([before[centered], after[centered]])
    right.plot(x[centered].expand(2, -1).numpy(), ends.numpy(), color="0.7", linewidth=1, zorder=1)
    right.scatter(x.numpy(), before.numpy(), sizes, _PACKED, label="before the center")
    right.scatter(x.numpy(), after.numpy(), sizes, _EXACT, label="with it, or without a center")
    right.axhline(COARSE, color="0.4", linestyle="--", linewidth=1)
    right.set(title="mid step / range (line: codes are widened by up to a third)")
    right.legend(fontsize="small")
    for axis in (left, right):
        axis.set_xlabel("layer")
        layer_ticks(axis.xaxis, measured)
        plain_log_axis(axis)
    return figure


def step_errors(measured: Measurement) -> Figure:
    """Bars: each metric for every combination of steps, with the first tokens packed or exact."""
    names = [steps.name for steps in COMBINATIONS]
    figure = new_figure(12, 7)
    axes = figure.subplots(2, 2, sharey=True)
    at = torch.arange(len(names)).flip(0)
    sinks = measured.settings.sinks
    sides = [(False, _PACKED, 0.2, "every old token packed")]
    if sinks:
        sides.append((True, _EXACT, -0.2, f"first {sinks} tokens exact"))
    for axis, (metric, title) in zip(axes.flat, METRICS.items(), strict=True):
        for exact, color, offset, label in sides:
            values = torch.stack([error(measured, metric, name, exact) for name in names])
            mean = values.mean((1, 2))
            low, high = torch.quantile(values.flatten(1), torch.tensor([0.1, 0.9]), dim=1)
            whiskers = torch.stack([(mean - low).clamp(min=0), (high - mean).clamp(min=0)])
            axis.barh((at + offset).numpy(), mean.numpy(), 0.38, color=color, label=label)
            axis.errorbar(
                mean.numpy(), (at + offset).numpy(), xerr=whiskers.numpy(), fmt="none",
                ecolor="0.25", elinewidth=0.8, capsize=2,
            )  # fmt: skip
            ends = (mean + whiskers[1]).tolist()
            for y, end, value in zip((at + offset).tolist(), ends, mean.tolist(), strict=True):
                axis.text(end, y, f"  {value:.3f}", va="center", fontsize=7, color=color)
        axis.set_title(title, fontsize="medium")
        axis.margins(x=0.12)
        axis.grid(True, axis="x", alpha=0.25)
        axis.set_yticks(at.numpy(), names)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    return figure


def layer_errors(measured: Measurement) -> Figure:
    """Lines over layers: error of scores and of the output for the story of the steps."""
    figure = new_figure(12, 3.8)
    axes = figure.subplots(1, 2)
    layers = [layer.layer for layer in measured.layers]
    for axis, metric in zip(axes, ("score", "output"), strict=True):
        for (name, note), color in zip(STORY.items(), _STAGE_COLORS, strict=True):
            values = error(measured, metric, name, False).mean(1)
            label = f"{name} ({note})"
            axis.plot(layers, values.numpy(), ".-", color=color, linewidth=1.2, label=label)
        axis.set(title=METRICS[metric], xlabel="layer", ylim=(0, None))
        axis.grid(True, alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def scaling_errors(measured: Measurement) -> Figure:
    """Error of K without and with token scaling: by a token's norm, and by a group's imbalance."""
    ratio = measured.ratios().flatten()
    spread = measured.imbalance().flatten()
    errors = torch.stack([layer.scaling_errors.float() for layer in measured.layers], 1)
    figure = new_figure(12, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    far = ratio.log2().abs() >= math.log2(OUTLIER_RATIO)
    for values, color, label in (
        (errors[0], _PACKED, "rotation, without token scaling"),
        (errors[1], _EXACT, "rotation, with token scaling"),
    ):
        tokens, groups = values.flatten(), values.unflatten(-1, (-1, GROUP_TOKENS)).mean(-1)
        _cloud(left, ratio, tokens, far, color)
        _cloud(right, spread, groups.flatten(), torch.zeros_like(spread, dtype=torch.bool), color)
        _medians(left, ratio, tokens, torch.arange(-8, 8.01, 0.25).exp2(), color, label)
        edges = torch.linspace(0, float(spread.max()), 13)
        _medians(right, spread, groups.flatten(), edges, color, label)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    left.set(xlabel="norm of the token / group median", ylabel="relative error of K")
    right.set(xlabel="imbalance of the group", ylim=(0, None))
    left.set_title("of a token")
    right.set_title("mean over the tokens of a group")
    for axis in (left, right):
        axis.grid(True, alpha=0.25)
    left.legend(title="lines: medians", fontsize="small")
    return figure


def _cloud(axis: Axes, x: Tensor, y: Tensor, always: Tensor, color: str) -> None:
    """Points, thinned to a number that a picture can hold; those of `always` stay."""
    keep = always.clone()
    keep[:: -(-x.numel() // _MAX_POINTS)] = True
    axis.plot(x[keep].numpy(), y[keep].numpy(), ".", color=color, ms=2, alpha=0.3)


def _medians(axis: Axes, x: Tensor, y: Tensor, edges: Tensor, color: str, label: str) -> None:
    bins = torch.bucketize(x, edges)
    inside = [bins == b for b in bins.unique().tolist() if int((bins == b).sum()) >= _LEAST_POINTS]
    line = [(float(x[chosen].median()), float(y[chosen].median())) for chosen in inside]
    if line:
        axis.plot(*zip(*line, strict=True), "o-", color=color, label=label, mec="black", ms=5)
