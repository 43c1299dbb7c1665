# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The HTML report of `oscar eval kl`, one file with its plots inside as SVG, and its tables."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .kl import FormatResult, pareto

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
tr.ours { background: #eef5ff; font-weight: 600; }
svg { max-width: 100%; height: auto; }
"""
_LABELLED = 24  # points of a plot that get their name
_AXIS_START = 1e-6  # nats: below lies float32 rounding


def write_report(path: Path, results: Sequence[FormatResult], settings: dict[str, Any]) -> None:
    """Writes the report; settings: lines of the heading, name to value."""
    shown = {name: _joined(value) for name, value in settings.items() if value is not None}
    lines = "".join(f"<li>{_text(name)}: {_text(value)}</li>" for name, value in shown.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>KV cache formats: KL against 16 bit</title>
<style>{_STYLE}</style></head><body>
<h1>KV cache formats against the exact cache</h1>
<ul>{lines}</ul>
<p>KL is the mean KL(exact || format) of the next-token distribution, in nats, &plusmn; its standard
error over documents. Bits an element count codes, scales, norms, windows and sinks at the measured
length; &ldquo;packed&rdquo; leaves windows and sinks out. Rows on blue ran through the packed
kernels, all others are simulations of what the format reads.</p>
{_table(results)}
<h2>KL against bits</h2>
{_svg(lambda axes: plot_bits(axes, results))}
{_below_note([result.format for result in results if result.kl < _AXIS_START])}
<h2>KL over position</h2>
{_svg(lambda axes: plot_position(axes, results, int(settings.get("prompt", 0))))}
{_below_note([r.format for r in results if float(r.curve().min()) < _AXIS_START])}
<h2>KL over positions and by document</h2>
<p>Median and quantiles over all decoded positions, then the mean of each document.</p>
{_document_table(results)}
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def sorted_by_bits(results: Sequence[FormatResult]) -> list[FormatResult]:
    """By the bits of the packed part, then by KL."""
    return sorted(results, key=lambda result: (round(result.packed_bits, 4), result.kl))


def cells(result: FormatResult) -> list[str]:
    """The cells of a table row: see COLUMNS."""
    return row_cells(result.row())


def row_cells(row: Mapping[str, Any]) -> list[str]:
    """`cells` of a row of the JSON file."""
    error = "" if row["kl_stderr"] is None else f" ± {row['kl_stderr']:.4f}"
    return [
        row["format"],
        row["label"],
        f"{row['packed_bits']:.3f}",
        f"{row['bits']:.3f}",
        f"{row['kl']:.4f}{error}",
        f"{row['dnll']:+.4f}",
        f"{row['top1']:.3f}",
    ]


COLUMNS = ("format", "setting", "packed bits", "bits", "KL", "dNLL", "top-1")


def comparable(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows must have in common to stand in one table; KeyError for what is no row."""
    names = ("model", "model_sha256", "tokens", "prompt", "documents_sha256", "along", "stress")
    return tuple(row[name] for name in names)


def heading(settings: Mapping[str, Any]) -> str:
    """The model and the lengths of a run, in a line; also of a row of the JSON file."""
    stress = "" if settings["stress"] == "none" else f", stress {settings['stress']}"
    along = ", along the model's own generation" if settings["along"] == "generation" else ""
    return (
        f"{settings['model']}: {len(settings['documents'])} documents of {settings['tokens']} "
        f"tokens, {settings['prompt']} prefilled exactly{along}{stress}"
    )


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables with a heading, one for rows that can be compared; KeyError: see `markdown`.

    Of several comparable rows of one format the last one is shown.
    """
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(comparable(row), {})[row["format"]] = row
    found = [list(group.values()) for group in groups.values()]
    return "\n\n".join(f"{heading(group[0])}\n\n{markdown(group)}" for group in found)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows of the JSON file, by packed bits; KeyError for what is no row."""
    lines = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2))]
    for row in sorted(rows, key=lambda row: (round(row["packed_bits"], 4), row["kl"])):
        name, *others = row_cells(row)
        bold = "**" if row["packed_kernels"] else ""
        lines.append((f"{bold}`{name}`{bold}", *others))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_bits(axes: Any, results: Sequence[FormatResult]) -> None:
    """KL over bits, everything counted, with the line of formats that no other one beats.

    A point below the axis is drawn at its start; the report says so.
    """
    best = pareto([(result.bits, result.kl) for result in results])
    points = [(result.bits, max(result.kl, _AXIS_START)) for result in results]
    for result, (bits, kl) in zip(results, points, strict=True):
        axes.plot(bits, kl, "D" if result.real else "o", color="C0" if result.real else "0.45")
        if len(results) <= _LABELLED:
            axes.annotate(result.format, (bits, kl), (5, 4), textcoords="offset points", fontsize=8)
    line = [points[index] for index in best]
    axes.plot(*zip(*line, strict=True), "--", color="C3", linewidth=1, label="Pareto line")
    axes.set(xlabel="bits an element (windows and sinks counted)", ylabel="KL, nats", yscale="log")
    axes.legend()


def plot_position(axes: Any, results: Sequence[FormatResult], prompt: int) -> None:
    """Mean KL over the position in the document, a line for each format; see `plot_bits`."""
    for index, result in enumerate(sorted_by_bits(results)):
        curve = result.curve()
        width = min(one.kl.numel() for one in result.documents) / curve.numel()
        position = [prompt + width * (bin_index + 0.5) for bin_index in range(curve.numel())]
        style = "-" if result.real else (0, (4, 1 + index // 10))
        axes.plot(position, curve.clamp(min=_AXIS_START), linestyle=style, label=result.format)
    axes.set(xlabel="position, tokens", ylabel="KL, nats", yscale="log")
    axes.legend(fontsize=7, ncols=2, bbox_to_anchor=(1.01, 1), loc="upper left")


def _svg(draw: Any) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.grid(True, which="both", alpha=0.25)
    draw(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _table(results: Sequence[FormatResult]) -> str:
    rows = [
        f"<tr{' class=ours' if result.real else ''}>{_row('td', cells(result))}</tr>"
        for result in sorted_by_bits(results)
    ]
    return f"<table><tr>{_row('th', COLUMNS)}</tr>{''.join(rows)}</table>"


def _document_table(results: Sequence[FormatResult]) -> str:
    names = [one.document for one in results[0].documents]
    rows = []
    for result in sorted_by_bits(results):
        figures = [*result.kl_quantiles(), *(float(one.kl.mean()) for one in result.documents)]
        values = [result.format, *(f"{figure:.4f}" for figure in figures)]
        rows.append(f"<tr>{_row('td', values)}</tr>")
    columns = ["format", "median", "99 %", "99.9 %", *names]
    return f"<table><tr>{_row('th', columns)}</tr>{''.join(rows)}</table>"


def _below_note(formats: Sequence[str]) -> str:
    """Says which formats have values that the axis above does not reach."""
    if not formats:
        return ""
    names = ", ".join(formats)
    return f"<p>Below {_AXIS_START:g} nats, drawn at the start of the axis: {_text(names)}.</p>"


def _joined(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _row(tag: str, values: Sequence[str]) -> str:
    return "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values)


def _text(value: Any) -> str:
    return html.escape(str(value))
