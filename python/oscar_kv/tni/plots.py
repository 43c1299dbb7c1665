# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report about norms: heat maps, norms over position, their distribution."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .measure import Measurement, imbalance, relative_norms
from .summary import heads, outliers
from .tokens import OUTLIER_RATIO, Token

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

START_TOKENS = 48  # tokens of the close view of the start
MAX_COLUMNS = 512  # of a heat map over all tokens
_LOW, _HIGH = "#2166ac", "#b2182b"  # low and large norms, as in the heat map
_KIND_COLORS = ("#ffffff", "#fde0c5", "#d4e8d4", "#dcd6ee")
_ANNOTATED = 8  # outliers named in a panel


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot, so that nothing global changes."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()


def plain(token: Token, limit: int = 12) -> str:
    """A token's text for matplotlib: no mathematics, no letters that its font lacks."""
    shown = token.shown(limit).encode("latin-1", "backslashreplace").decode("latin-1")
    return shown.replace("\\u2026", "…").replace("$", r"\$")


def pooled(log: Tensor, columns: int) -> tuple[Tensor, int]:
    """log [rows, tokens] in at most `columns` columns: (the most extreme value each, tokens each).

    A mean would hide the very tokens that are looked for.
    """
    width = -(-log.shape[1] // columns)
    padded = torch.nn.functional.pad(log, (0, -log.shape[1] % width)).unflatten(1, (-1, width))
    at = padded.abs().argmax(-1, keepdim=True)
    return padded.gather(-1, at)[..., 0], width


def _ratio_limit(log: Tensor) -> float:
    return max(1.0, float(log.abs().max()))


def _ratio_bar(figure: Figure, image: Any, axis: Any, limit: float) -> None:
    ticks = [t for t in (-4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4) if abs(t) <= limit]
    bar = figure.colorbar(image, ax=axis, ticks=ticks, pad=0.01)
    bar.ax.set_yticklabels([f"{2.0**t:.2g}" for t in ticks])
    bar.set_label("norm / group median")


def token_map(measured: Measurement) -> Figure:
    """Heat map layer x token of the key norm relative to its group, geometric mean over heads."""
    log = measured.ratios().log2().mean(1)
    limit = _ratio_limit(log)
    figure = new_figure(12, 7.2)
    top, bottom = figure.subplots(2, 1, height_ratios=[1.15, 1])
    whole, width = pooled(log, MAX_COLUMNS)
    first = min(START_TOKENS, log.shape[1])
    options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "aspect": "auto"}
    options |= {"interpolation": "nearest", "origin": "lower"}
    rows = len(measured.layers)
    for axis, data, end in ((top, log[:, :first], first), (bottom, whole, whole.shape[1] * width)):
        extent = (-0.5, end - 0.5, -0.5, rows - 0.5)
        image = axis.imshow(data.numpy(), extent=extent, **options)
        axis.set_ylabel("layer")
        layer_ticks(axis.yaxis, measured)
    _ratio_bar(figure, image, [top, bottom], limit)
    labels = [plain(token, 8) for token in measured.tokens[:first]]
    top.set_xticks(range(first), labels, rotation=90, fontsize=7)
    top.set_title(f"the first {first} tokens")
    each = "" if width == 1 else f" (each column shows the most extreme of {width} tokens)"
    bottom.set_title(f"all {log.shape[1]} tokens{each}", pad=20 if _several_kinds(measured) else 6)
    bottom.set_xlabel("position")
    _shade_kinds(bottom, measured.tokens, strip=True)
    return figure


def layer_ticks(axis: Any, measured: Measurement) -> None:
    """Names the layers on an axis that counts the measured ones."""
    names = [layer.layer for layer in measured.layers]
    step = -(-len(names) // 16)
    axis.set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])


def _several_kinds(measured: Measurement) -> bool:
    return len({token.kind for token in measured.tokens}) > 1


def _shade_kinds(axis: Axes, tokens: list[Token], strip: bool = False) -> None:
    """Marks spans of kinds other than the first one, where there are several."""
    kinds = list(dict.fromkeys(token.kind for token in tokens))
    if len(kinds) == 1:
        return
    start = 0
    for at in range(1, len(tokens) + 1):
        kind = tokens[start].kind
        if at < len(tokens) and tokens[at].kind == kind:
            continue
        color = _KIND_COLORS[kinds.index(kind) % len(_KIND_COLORS)]
        if strip:
            span = dict(facecolor=color, edgecolor="black", linewidth=0.5, clip_on=False)
            axis.axvspan(start - 0.5, at - 0.5, ymin=1.0, ymax=1.06, **span)
            place: dict[str, Any] = {
                "transform": axis.get_xaxis_transform(),
                "ha": "center",
                "va": "center",
            }
            if at - start > 0.05 * len(tokens):
                axis.text((start + at) / 2, 1.03, kind, fontsize=8, **place)
        elif kind != kinds[0]:
            axis.axvspan(start - 0.5, at - 0.5, color=color, label=kind, zorder=0)
        start = at


def imbalance_map(measured: Measurement) -> Figure:
    """Mean imbalance of every layer and KV head."""
    mean = measured.imbalance().mean(-1).T
    kv_heads, layers = mean.shape
    figure = new_figure(12, min(1.4 + 0.38 * kv_heads, 8))
    axis = figure.subplots()
    image = axis.imshow(mean.numpy(), cmap="viridis", aspect="auto", vmin=0, origin="lower")
    layer_ticks(axis.xaxis, measured)
    axis.set(xlabel="layer", ylabel="KV head", yticks=range(0, kv_heads, -(-kv_heads // 8)))
    figure.colorbar(image, ax=axis, pad=0.01).set_label("(max - min) / median")
    if kv_heads * layers <= 320 and layers <= 40:
        middle = float(mean.max()) / 2
        for head in range(kv_heads):
            for layer in range(layers):
                value = float(mean[head, layer])
                color = "white" if value < 1.3 * middle else "black"
                text = f"{value:.1f}" if value < 10 else f"{value:.0f}"
                axis.text(layer, head, text, ha="center", va="center", fontsize=7, color=color)
    return figure


def norm_distribution(measured: Measurement) -> Figure:
    """Quantiles of the key norms of every layer (and head, where they are few)."""
    figure = new_figure(12, 4.2)
    axis = figure.subplots()
    kv_heads = measured.layers[0].norms.shape[0]
    series = kv_heads if kv_heads <= 8 else 1
    colors = [f"C{index}" for index in range(series)]
    for at, layer in enumerate(measured.layers):
        quantiles = layer.quantiles()
        if series == 1 and kv_heads > 1:
            quantiles = quantiles.mean(0, keepdim=True)
        for head, (low, p1, p25, p50, p75, p99, high) in enumerate(quantiles.tolist()):
            x = at + 0.8 * ((head + 0.5) / series - 0.5)
            axis.plot([x, x], [p1, p99], color=colors[head], linewidth=1)
            axis.plot([x, x], [p25, p75], color=colors[head], linewidth=4, solid_capstyle="butt")
            axis.plot(x, p50, "_", color="white", markersize=5)
            axis.plot([x, x], [low, high], "x", color=colors[head], markersize=3.5)
    for head in range(series if series > 1 else 0):
        axis.plot([], [], color=colors[head], linewidth=4, label=f"KV head {head}")
    if series > 1:
        axis.legend(fontsize="small", ncols=series, loc="best")
    layer_ticks(axis.xaxis, measured)
    axis.set(xlabel="layer", ylabel="key norm (log scale)")
    axis.margins(x=0.01)
    plain_log_axis(axis)
    return figure


def plain_log_axis(axis: Axes) -> None:
    """Numbers such as 0.5 and 20 on a logarithmic y axis, and a grid."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, axis="y", which="both", alpha=0.25)


def chosen_heads(measured: Measurement) -> list[tuple[int, int, str]]:
    """(row of `layers`, head, why) of heads worth a look: extremes and a typical one."""
    row_of = {layer.layer: row for row, layer in enumerate(measured.layers)}
    ranked = heads(measured)
    low, high = outliers(measured)
    found = [(ranked[0].layer, ranked[0].head, "largest imbalance")]
    found += [(one.layer, one.head, "strongest low-norm token") for one in low[:1]]
    found += [(one.layer, one.head, "strongest large-norm token") for one in high[:1]]
    count = (measured.ratios().log2().abs() >= math.log2(OUTLIER_RATIO)).sum(-1)
    if int(count.max()) > 0:
        row, head = divmod(int(count.argmax()), count.shape[1])
        found.append((measured.layers[row].layer, head, "most outliers"))
    middle = ranked[len(ranked) // 2]
    found.append((middle.layer, middle.head, "median imbalance"))
    reasons: dict[tuple[int, int], list[str]] = {}
    for layer, head, why in found:
        reasons.setdefault((row_of[layer], head), []).append(why)
    return [(row, head, ", ".join(why)) for (row, head), why in reasons.items()]


def norm_over_position(measured: Measurement) -> Figure:
    """Norm of every token for chosen heads, outliers named by their text."""
    panels = chosen_heads(measured)
    figure = new_figure(12, 3.3 * len(panels))
    axes: list[Axes] = list(figure.subplots(len(panels), 1, squeeze=False)[:, 0])
    for axis, (row, head, why) in zip(axes, panels, strict=True):
        layer = measured.layers[row]
        norms = layer.norms[head]
        relative = relative_norms(norms)
        median = norms / relative
        axis.plot(norms.numpy(), ".", color="0.45", markersize=3, label="a token")
        axis.plot(median.numpy(), color="black", linewidth=1, label="median of its group of 32")
        _mark_outliers(axis, norms, relative, measured.tokens)
        _shade_kinds(axis, measured.tokens)
        name = f"layer {layer.layer}, KV head {head}: {why}"
        spread = f"imbalance {float(imbalance(norms).mean()):.2f}"
        axis.set(title=f"{name} ({spread})", ylabel="key norm")
        axis.set_ylim(0, 1.12 * float(norms.max()) or 1.0)
        axis.margins(x=0.01)
    axes[-1].set_xlabel("position")
    axes[0].legend(*_unique_labels(axes[0]), fontsize="small", loc="best", ncols=4)
    return figure


def _unique_labels(axis: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    return list(unique.values()), list(unique)


def _mark_outliers(axis: Axes, norms: Tensor, relative: Tensor, tokens: list[Token]) -> None:
    sides = (
        (relative <= 1 / OUTLIER_RATIO, _LOW, f"below 1/{OUTLIER_RATIO:.0f} of it"),
        (relative >= OUTLIER_RATIO, _HIGH, f"above {OUTLIER_RATIO:.0f} times it"),
    )
    for beyond, color, label in sides:
        at = beyond.nonzero()[:, 0]
        if len(at):
            axis.plot(at.numpy(), norms[at].numpy(), "o", color=color, markersize=4, label=label)
    far, bound = relative.log2().abs(), math.log2(OUTLIER_RATIO)
    order = far.argsort(descending=True).tolist()
    named: list[int] = []
    apart = len(tokens) / 14  # names closer than this would overlap
    for position in order:
        if len(named) == _ANNOTATED or far[position] < bound:
            break
        if all(abs(position - other) > apart for other in named):
            named.append(position)
    for position in named:
        low = bool(relative[position] < 1)
        below = low and norms[position] > 0.1 * norms.max()  # there is room for a name
        axis.annotate(
            f"{plain(tokens[position])} @{position}",
            (position, float(norms[position])),
            xytext=(3, -11 if below else 6),
            textcoords="offset points",
            fontsize=7.5,
            color=_LOW if low else _HIGH,
        )
