# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar eval ocrbench`: OCRBench from the data set's files, beside the paper's table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..eval.tasks.media_runner import MediaRunner
from ..eval.tasks.ocrbench import PAPER, PAPER_MODELS, PARTS, Score, ask, read_questions, score
from ..eval.tasks.store import Store
from .common import ModelOption, SinksOption, ThreadsOption, WindowOption, progress_bar, set_threads
from .eval_common import (
    FormatsOption,
    JsonOption,
    OutputOption,
    check_folder,
    formats_of,
    installed,
    run_settings,
)
from .multimodal import load_multimodal


def ocrbench(
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder with OCRBench.json and its images, or with Parquet files."
        ),
    ],
    model: ModelOption = None,
    formats: FormatsOption = "16bit,k2v2",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N questions of each part.")
    ] = None,
    window: WindowOption = 32,
    sinks: SinksOption = 4,
    output: OutputOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """OCRBench with the official scoring, from a 16-bit and packed caches.

    The data set is read from files that you bring: the official OCRBench.json with its folder of
    images, or the Parquet files of echo840/OCRBench. Greedy, 128 new tokens, the question alone in
    the model's chat template; image sizes are those of the checkpoint's processor. The records in
    --output have the official fields.

    Example: oscar eval ocrbench --data OCRBench --model ./llava-v1.6-mistral-7b-hf --output answers
    """
    set_threads(threads)
    chosen = formats_of(formats)
    check_folder(output, "--output")
    questions = read_questions(data, limit)
    loaded = load_multimodal(model)
    store = Store(output, run_settings(loaded, window, sinks, "auto"))
    runner = MediaRunner(loaded.model, loaded.processor, chosen, window=window, sinks=sinks)
    with installed(loaded), progress_bar("OCRBench", len(questions)) as advance:
        records = ask(runner, questions, store, advance)
    scores = [score(format, records[format]) for format in chosen]
    if as_json:
        print(json.dumps([dataclasses.asdict(one) | {"score": one.score} for one in scores]))
        return
    Console().print(_table(loaded.name, scores))
    Console().print(_paper())


def _table(model: str, scores: list[Score]) -> Table:
    questions = scores[0].questions
    asked = sum(questions.values())
    note = "" if asked == 1000 else f"; {asked} questions: no official score"
    table = Table(title=f"OCRBench, {model}{note}")
    table.add_column("format")
    table.add_column("bits", justify="right")
    for part in PARTS:
        table.add_column(f"{part} / {questions[part]}", justify="right")
    table.add_column("hits per 1000", justify="right")
    for one in scores:
        hits = [str(one.hits[part]) for part in PARTS]
        table.add_row(one.format, f"{one.bits:.2f}", *hits, f"{one.score:.0f}")
    return table


def _paper() -> Table:
    table = Table(
        title="OCRBench as published (OScaR, arXiv 2605.19660)",
        caption="Its harness and image sizes are not named: compare with the 16-bit row above.",
    )
    table.add_column("method")
    for column in ("bits", *PAPER_MODELS):
        table.add_column(column, justify="right")
    for name, bits, *values in PAPER:
        table.add_row(name, "" if bits is None else f"{bits:.2f}", *map(str, values))
    return table
