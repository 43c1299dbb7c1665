# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The picture of a benchmark: microseconds a call over tokens, one panel a shape."""

from __future__ import annotations

from pathlib import Path

from .attention import Row


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
