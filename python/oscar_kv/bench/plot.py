# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The picture of a benchmark: microseconds a call over tokens, one panel a shape."""

from __future__ import annotations

from pathlib import Path

from .attention import Row
from .cuda import FLASH, CudaRow


def save_plot(rows: list[Row], path: Path) -> None:
    """Writes a PNG with a panel for each (shape, batch, threads)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row.shape, row.batch, row.threads) for row in rows})
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 5), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        chosen = [row for row in rows if (row.shape, row.batch, row.threads) == panel]
        for kernel in dict.fromkeys(row.kernel for row in chosen):
            points = sorted((row.tokens, row.us) for row in chosen if row.kernel == kernel)
            style = ":" if kernel.startswith("read") else "-"
            axis.plot(*zip(*points, strict=True), style, marker="o", label=kernel)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tokens in the cache",
            ylabel="us a call (median)",
            title=f"{panel[0]}, batch {panel[1]}, {panel[2]} thread(s)",
        )
        axis.grid(True, which="both", alpha=0.3)
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save_cuda_plot(rows: list[CudaRow], path: Path) -> None:
    """Writes a PNG: time over context for one sequence, and speedup over batch at each context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    decode = [row for row in rows if row.queries == 1 and not row.ragged]
    shapes = [row.shape for row in decode]
    shape = max(set(shapes), key=shapes.count)
    decode = [
        row for row in decode if row.shape == shape and not row.kernel.startswith(("copy", "plan"))
    ]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for kernel in dict.fromkeys(row.kernel for row in decode):
        points = sorted((r.tokens, r.us) for r in decode if r.kernel == kernel and r.batch == 1)
        if points:
            style = ":" if kernel.startswith("read") else "-"
            left.plot(*zip(*points, strict=True), style, marker="o", label=kernel)
    left.set(xlabel="tokens in the cache", ylabel="us a call (median)", yscale="log")
    left.set_title(f"{shape}, one sequence")
    ours = [row for row in decode if row.kernel.startswith("oscar")]
    for kernel in dict.fromkeys(row.kernel for row in ours):
        mine = [row for row in ours if row.kernel == kernel]
        right.plot([row.batch for row in mine], [row.speedup for row in mine], "o", label=kernel)
        for row in mine:
            right.annotate(f" {row.tokens >> 10}K", (row.batch, row.speedup), fontsize="small")
    right.axhline(1.0, color="grey", linewidth=1)
    right.set(xlabel="sequences", ylabel=f"times faster than {FLASH}")
    right.set_title(f"{shape}, tokens a sequence at each point")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
