# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar eval kl`: how far each cache format moves a model's predictions, beside its bits."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .common import InputError, ModelOption, ThreadsOption, read_text, set_threads
from .models import LoadedModel, load_model

if TYPE_CHECKING:
    from ..eval.formats import AnyFormat
    from ..eval.kl import Document, FormatResult

_DEFAULT = "k2v2,k4v2,k4v4,paper,kivi,int4,int8"


class Half(str, Enum):
    """Which of the documents that come along."""

    TUNING = "tuning"
    REPORTING = "reporting"
    ALL = "all"


def kl(
    model: ModelOption = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text, a document each; repeatable. Without it: "
            "eight documents made from what is installed (docs, code, prose, chat).",
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A,B,...",
            help="Formats with parameters, such as k2v2:window=64 or "
            "kivi:g=32,r=128; `all`: every method. Repeatable.",
            show_default=_DEFAULT,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of each document.")] = 4096,
    prompt_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Part of them that is prefilled exactly.")
    ] = 0.5,
    from_start: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Read compressed from this token on instead, as a prompt in "
            "chunks of this size does.",
            show_default=False,
        ),
    ] = None,
    stress: Annotated[
        float | None,
        typer.Option(
            help="Outlier stress: two RoPE pairs of K in every head times this, of Q "
            "divided by it; the 16-bit model stays the same.",
            show_default=False,
        ),
    ] = None,
    modality_stress: Annotated[
        float | None,
        typer.Option(
            help="Modality stress: spans of the text play images and sounds, their keys are "
            "stored times this and divided by it; packed formats are simulated then.",
            show_default=False,
        ),
    ] = None,
    equal_window: Annotated[
        bool, typer.Option("--equal-window", help="Add each baseline at our window and sinks.")
    ] = False,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Use the first N documents.", show_default=False)
    ] = None,
    half: Annotated[Half, typer.Option(help="Documents for tuning, for reporting, or all.")] = (
        Half.ALL
    ),
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write a JSON list, a row per format; - for standard output.",
            show_default=False,
        ),
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a report with plots, one HTML file.",
            show_default=False,
        ),
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure cache formats: mean KL against the exact cache, NLL change, top-1, bits an element.

    Each document is prefilled exactly, then decoded by teacher forcing through every format; all
    arithmetic is float32. k2v2, k4v2 and k4v4 run through the packed kernels, all others are
    simulated: their queries read quantised and dequantised copies. Bits count codes, scales, norms,
    windows and sinks at the measured length.

    Example: oscar eval kl --formats all --equal-window --html report.html
    """
    set_threads(threads)
    _check_folders(json_file, html_file)
    prompt = int(tokens * prompt_fraction) if from_start is None else from_start
    if not 0 < prompt < tokens:
        raise InputError(f"{prompt} of {tokens} tokens would be prefilled, must be 1 to tokens - 1")
    chosen = _formats(formats or [_DEFAULT], equal_window)
    contents = {str(path): read_text(path, "--text") for path in text or []}
    if modality_stress is not None:
        from ..eval.modality import ModalityStress

        chosen = [ModalityStress(one, modality_stress) for one in chosen]
    loaded = load_model(model, torch.float32)
    loaded.check_length(tokens)
    if stress is not None:
        from ..eval.stress import stressed

        loaded.model = stressed(loaded.model, stress)
    found = _documents(loaded, contents, tokens, half)[:documents]
    results = _run(loaded, found, chosen, prompt)
    settings = {
        "model": loaded.name,
        "documents": ", ".join(document.name for document in found),
        "tokens": tokens,
        "prompt": prompt,
        "stress": _stresses(stress, modality_stress),
    }
    if json_file is not None:
        lines = json.dumps([result.row() for result in results], indent=1)
        if str(json_file) == "-":
            print(lines)
            return
        json_file.write_text(lines + "\n", encoding="utf-8")
    if html_file is not None:
        from ..eval.report import write_report

        write_report(html_file, results, settings)
    _show(results, settings)


def _stresses(outliers: float | None, modality: float | None) -> str:
    parts = [str(outliers)] if outliers is not None else []
    if modality is not None:
        parts.append(f"modality {modality}")
    return ", ".join(parts) or "none"


def _check_folders(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise InputError(f"folder {file.parent} does not exist")


def _formats(values: list[str], equal: bool) -> list[AnyFormat]:
    from ..eval.formats import equal_window, make_format, split_formats

    specs = split_formats(",".join(values))
    made = [make_format(spec) for spec in specs]
    if equal:
        extra = (equal_window(spec) for spec in specs)
        new = dict.fromkeys(spec for spec in extra if spec is not None and spec not in specs)
        made += [make_format(spec) for spec in new]
    return made


def _documents(
    loaded: LoadedModel, contents: dict[str, str], tokens: int, half: Half
) -> list[Document]:
    from ..eval.texts import builtin_documents, file_documents

    if contents:
        return file_documents(loaded.tokenizer, contents, tokens)
    wanted = None if half is Half.ALL else half.value
    found, short = builtin_documents(loaded.tokenizer, tokens, wanted)
    if short:
        print(f"left out, shorter than {tokens} tokens: {', '.join(short)}", file=sys.stderr)
    if not found:
        raise InputError(f"no document has {tokens} tokens: lower --tokens or give --text")
    return found


def _run(
    loaded: LoadedModel, documents: list[Document], formats: list[AnyFormat], prompt: int
) -> list[FormatResult]:
    from ..eval.kl import evaluate

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    total = len(documents) * (len(formats) + 2)
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("", total=total)
        started = False

        def advance(line: str) -> None:
            nonlocal started
            progress.update(task, description=line, advance=1 if started else 0)
            started = True

        results = evaluate(loaded.model, documents, formats, prompt, advance)
        progress.update(task, completed=total, description="done")
    return results


def _show(results: list[FormatResult], settings: dict[str, Any]) -> None:
    from ..eval.report import COLUMNS, cells, sorted_by_bits

    lengths = f"{settings['tokens']} tokens, {settings['prompt']} prefilled exactly"
    stress = "" if settings["stress"] == "none" else f", stress {settings['stress']}"
    count = len(results[0].documents)
    table = Table(
        title=f"{settings['model']}: {count} documents of {lengths}{stress}", title_justify="left"
    )
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right")
    for result in sorted_by_bits(results):
        table.add_row(*cells(result), style="bold" if result.real else None)
    Console(highlight=False).print(table)
