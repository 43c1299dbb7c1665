# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar tni`: token norm imbalance of a model on a text, and what each step mends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .common import (
    InputError,
    ModelOption,
    PackedFormat,
    SinksOption,
    ThreadsOption,
    WindowOption,
    prefill_bar,
    progress_bar,
    read_text,
    set_threads,
)
from .models import LoadedModel, load_model

if TYPE_CHECKING:
    from torch import Tensor

    from ..tni import Measurement

_ROWS = 6  # of each table on the screen


def tni(
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to measure on.")],
    model: ModelOption = None,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of the text to use at most.")] = 2048,
    format: Annotated[PackedFormat, typer.Option(help="Bits of K and V for the errors.")] = (
        PackedFormat.K2V2
    ),
    window: WindowOption = 32,
    sinks: SinksOption = 4,
    balance: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Balance to use; without it the text's own is measured."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Image before the text; repeatable. The model must take images.",
            show_default=False,
        ),
    ] = None,
    sound: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="16-bit WAV file before the text; repeatable. The model must take sounds.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report with pictures.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Report how uneven key norms are, and what each step of the format mends.

    A few tokens whose keys are much smaller (attention sinks) or larger than their neighbours'
    spoil the 2-bit codes of all 32 tokens that share a range. Shows where that happens, which
    tokens they are, and the errors of K, V, scores and attention output with and without balance,
    rotation, token scaling and center. For each head: the constant part of its keys, which the
    center takes off. Key norms are taken after RoPE, per layer and KV head. With images or sounds
    it also compares the kinds of tokens.

    Example: oscar tni --model ./checkpoint --text book.txt --html report.html
    """
    from ..balance import Balance
    from ..tni import Settings, as_dict, label_tokens, measure, save_html, token_kinds

    set_threads(threads)
    content = read_text(text, "--text")
    for option, path in (("--html", html), ("--json", as_json)):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{option}: folder {path.parent} does not exist")
    given = None if balance is None else Balance.load(balance)
    loaded, inputs = _inputs(model, content, tokens, image or [], sound or [])
    ids = inputs.pop("input_ids")
    loaded.check_length(ids.shape[1])
    listed = ids[0].tolist()
    labels = label_tokens(loaded.tokenizer, listed, token_kinds(loaded.model.config, listed))
    settings = Settings(format=format.value, window=window, sinks=sinks)
    known = {"balance": given, "name": loaded.name}
    with prefill_bar(f"measuring {len(listed)} tokens", loaded.model):
        measured = measure(loaded.model, ids, labels, settings, **known, **inputs)
    _show(measured)
    if as_json is not None:
        as_json.write_text(json.dumps(as_dict(measured), indent=1), encoding="utf-8")
    if html is not None:
        with progress_bar("drawing"):
            save_html(measured, html)
        print(f"report: {html}")


def _inputs(
    model: Path | None, content: str, tokens: int, images: list[Path], sounds: list[Path]
) -> tuple[LoadedModel, dict[str, Tensor]]:
    """The model and one prompt for it; of a text alone at most `tokens` tokens."""
    if not images and not sounds:
        loaded = load_model(model)
        return loaded, {"input_ids": loaded.encode(content)[:, :tokens]}
    from ..eval.tasks.media import make_inputs, read_image, read_sound, sampling_rate
    from .multimodal import load_multimodal

    seen = [read_image(path) for path in images]
    both = load_multimodal(model)
    heard = [read_sound(path, sampling_rate(both.processor)) for path in sounds]
    return both, make_inputs(both.model, both.processor, content, seen, heard)


def _show(measured: Measurement) -> None:
    from ..tni import findings

    console = Console()
    for sentence in findings(measured):
        console.print(f"• {escape(sentence)}", highlight=False)
    for draw in (_token_table, _head_table, _constant_table, _error_table):
        console.print(draw(measured))
    if len({token.kind for token in measured.tokens}) > 1:
        console.print(_kind_table(measured))


def _token_table(measured: Measurement) -> Table:
    from ..tni.summary import STORY, outliers, token_error

    table = Table(title="tokens far from their group's median norm")
    for name in ("text", "kind"):
        table.add_column(name)
    for name in ("position", "norm / median", "share of heads", *(f"K error {s}" for s in STORY)):
        table.add_column(name, justify="right")
    for one in (one for found in outliers(measured, _ROWS) for one in found):
        errors = [f"{token_error(measured, name, one.position):.2f}" for name in STORY]
        text = escape(one.token.shown())
        figures = [str(one.position), f"{one.ratio:.2f}", f"{one.share:.0%}"]
        table.add_row(text, one.token.kind, *figures, *errors)
    return table


def _head_table(measured: Measurement) -> Table:
    from ..tni.summary import STORY, heads

    table = Table(title="most imbalanced heads (means over groups of 32 tokens)")
    columns = ("layer", "KV head", "imbalance", "max / min", "max / median")
    for name in (*columns, *(f"K error {story}" for story in STORY)):
        table.add_column(name, justify="right")
    for head in heads(measured)[:_ROWS]:
        figures = (head.imbalance, head.max_over_min, head.max_over_median)
        errors = [head.errors[name] for name in STORY]
        cells = [f"{x:.2f}" for x in (*figures, *errors)]
        table.add_row(str(head.layer), str(head.head), *cells)
    return table


def _constant_table(measured: Measurement) -> Table:
    from ..tni.constant import COLUMNS, constants

    table = Table(title="constant part of keys (coarsest mids first; score error in nats)")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for head in constants(measured)[:_ROWS]:
        table.add_row(*head.cells())
    return table


def _kind_table(measured: Measurement) -> Table:
    from ..tni import modalities
    from ..tni.summary import STORY

    table = Table(title="kinds of tokens")
    table.add_column("kind")
    columns = ("tokens", "in mixed groups", "norm / median of all")
    for name in (*columns, *(f"K error {story}" for story in STORY)):
        table.add_column(name, justify="right")
    for one in modalities(measured):
        errors = [f"{one.errors[name]:.3f}" for name in STORY]
        table.add_row(one.kind, str(one.tokens), str(one.mixed), f"{one.norm:.2f}", *errors)
    return table


def _error_table(measured: Measurement) -> Table:
    from ..tni.measure import METRICS
    from ..tni.quantize import COMBINATIONS
    from ..tni.summary import error

    sinks = measured.settings.sinks
    table = Table(title=f"error by step, {measured.settings.format} (every old token packed)")
    table.add_column("steps")
    for metric in METRICS:
        table.add_column(metric, justify="right")
    table.add_column(f"output, first {sinks} exact", justify="right")
    for steps in COMBINATIONS:
        figures = [error(measured, metric, steps.name, False) for metric in METRICS]
        figures.append(error(measured, "output", steps.name, True))
        table.add_row(steps.name, *(f"{float(x.mean()):.3f}" for x in figures))
    return table
