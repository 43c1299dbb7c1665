# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar eval mmau-pro`: MMAU-Pro from the data set's files, beside the paper's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..eval.tasks.media_runner import MediaRunner
from ..eval.tasks.mmau_pro import PAPER, ask, fill_column, followed_rate, read_items
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


def mmau_pro(
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder with test.parquet (or test.jsonl) and the audio files."
        ),
    ],
    model: ModelOption = None,
    categories: Annotated[
        str,
        typer.Option(
            metavar="A,B,...", help="Categories as the data set names them, or 'all' of them."
        ),
    ] = "open,instruction following",
    formats: FormatsOption = "16bit,k2v2",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N records of each category.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 512,
    window: WindowOption = 32,
    sinks: SinksOption = 4,
    output: OutputOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """MMAU-Pro: answers from a 16-bit and packed caches, instruction following scored.

    The data set is read from files that you bring; its audio as 16-bit WAV at the rate of the
    model's processor. Open-ended and multiple-choice answers are scored by other models in the
    official evaluate_mmau_pro_comprehensive.py: --output gets the file it reads, one a format, as
    DIR/FORMAT/test.parquet with the column model_output.

    Example: oscar eval mmau-pro --data MMAU-Pro --model ./Qwen3-Omni-30B-A3B --output answers
    """
    set_threads(threads)
    chosen = formats_of(formats)
    check_folder(output, "--output")
    wanted = [] if categories == "all" else [name.strip() for name in categories.split(",")]
    items = read_items(data, wanted, limit)
    loaded = load_multimodal(model)
    settings = run_settings(loaded, window, sinks, "auto", new_tokens=new_tokens)
    store = Store(output, settings)
    runner = MediaRunner(loaded.model, loaded.processor, chosen, window=window, sinks=sinks)
    with installed(loaded), progress_bar("MMAU-Pro", len(items)) as advance:
        records = ask(runner, items, store, new_tokens, advance)
    if output is not None:
        ending = ".parquet" if (data / "test.parquet").is_file() else ".jsonl"
        for format in chosen:
            fill_column(items, records[format], output / format / f"test{ending}")
    rows = [_row(format, records[format]) for format in chosen]
    if as_json:
        print(json.dumps(rows))
        return
    Console().print(_table(loaded.name, rows))
    Console().print(_paper())


def _row(format: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    count, rate = followed_rate(records)
    total = len(records)
    return {
        "format": format,
        "bits": sum(record["bits"] for record in records) / total,
        "items": total,
        "tokens": sum(record["tokens"] for record in records) / total,
        "aif_items": count,
        "aif": rate,
    }


def _table(model: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"MMAU-Pro, {model}")
    table.add_column("format")
    for name in ("bits", "items", "tokens an answer", "AIF items", "AIF %"):
        table.add_column(name, justify="right")
    for row in rows:
        rate = "" if row["aif"] is None else f"{row['aif']:.1f}"
        figures = [f"{row['bits']:.2f}", str(row["items"]), f"{row['tokens']:.0f}"]
        table.add_row(row["format"], *figures, str(row["aif_items"]), rate)
    return table


def _paper() -> Table:
    table = Table(
        title="MMAU-Pro as published (OScaR, arXiv 2605.19660), Qwen3-Omni-30B-A3B",
        caption="AIF there is of 87 items: one is 1.15 points. The first two columns come from the "
        "official script, which samples its judge: run it several times.",
    )
    table.add_column("method")
    for name in ("bits", "open-ended", "good rate", "AIF %"):
        table.add_column(name, justify="right")
    for method, bits, *values in PAPER:
        shown = "" if bits is None else f"{bits:.2f}"
        table.add_row(method, shown, *(f"{value:.1f}" for value in values))
    return table
