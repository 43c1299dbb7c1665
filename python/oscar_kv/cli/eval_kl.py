# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar eval kl`: how far each cache format moves a model's predictions, beside its bits."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import cuda_available
from .common import InputError, ModelOption, ThreadsOption, read_text, set_threads
from .models import LoadedModel, load_model, pick_device

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
    offset: Annotated[
        str | None,
        typer.Option(
            metavar="X[,pairs=A,B]",
            help="Offset stress: plus or minus this on RoPE pairs of every K head: slow, middle "
            "and fast ones, or those named or numbered. The 16-bit model changes with it.",
            show_default=False,
        ),
    ] = None,
    value_offset: Annotated[
        float | None,
        typer.Option(
            help="The same on V, on the same channels, taken off behind the attention; the 16-bit "
            "model stays the same.",
            show_default=False,
        ),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Decode N tokens that the 16-bit model draws after the prompt, in place of the "
            "text's own.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of these draws; 0: the most likely token.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of these draws.")] = 0,
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
            help="Write the settings and a row per format; - for standard output.",
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
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: ThreadsOption = None,
) -> None:
    """Measure cache formats: mean KL against the exact cache, NLL change, top-1, bits an element.

    Each document is prefilled exactly, then decoded by teacher forcing through every format, with
    --generate along tokens that the model draws itself; all arithmetic is float32. k2v2, k4v2 and
    k4v4 run through the packed kernels, all others are simulated: their queries read quantised and
    dequantised copies. Bits count codes, scales, norms, windows and sinks at the measured length.

    Example: oscar eval kl --formats all --equal-window --html report.html
    """
    set_threads(threads)
    _check_folders(json_file, html_file)
    place = pick_device(device)
    prompt = int(tokens * prompt_fraction) if from_start is None else from_start
    if not 0 < prompt < tokens:
        raise InputError(f"{prompt} of {tokens} tokens would be prefilled, must be 1 to tokens - 1")
    needed = tokens if generate is None else prompt  # of a text
    stresses = _Stresses(stress, modality_stress, offset, value_offset)
    chosen = stresses.of_formats(_formats(formats or [_DEFAULT], equal_window))
    _check_kernels(chosen, place)
    contents = {str(path): read_text(path, "--text") for path in text or []}
    loaded = load_model(model, torch.float32, place)
    loaded.check_length(prompt + (generate or tokens - prompt))
    loaded.model = stresses.of_model(loaded.model)
    found = _documents(loaded, contents, needed, half)[:documents]
    draws = None if generate is None else _Draws(generate, temperature, seed)
    found, results = _run(loaded, found, chosen, prompt, draws)
    _write(loaded, found, results, prompt, draws, str(stresses), json_file, html_file)


@dataclass
class _Stresses:
    """The options that make a model or its formats harder; None: not asked for."""

    outliers: float | None
    modality: float | None
    offset: str | None
    value_offset: float | None

    def __post_init__(self) -> None:
        self._offset()  # checks it before anything is loaded

    def of_formats(self, formats: list[AnyFormat]) -> list[AnyFormat]:
        """The formats, given stressed keys."""
        if self.modality is None:
            return formats
        from ..eval.modality import ModalityStress

        return [ModalityStress(one, self.modality) for one in formats]

    def of_model(self, model: Any) -> Any:
        """The model, or a stressed copy."""
        from ..eval.stress import stressed, with_offsets

        if self.outliers is not None:
            model = stressed(model, self.outliers)
        if self.offset is not None or self.value_offset is not None:
            size, pairs = self._offset()
            model = with_offsets(model, size, pairs, self.value_offset or 0.0)
        return model

    def _offset(self) -> tuple[float, tuple[str, ...]]:
        from ..eval.stress import PAIRS, parse_offset

        return (0.0, PAIRS) if self.offset is None else parse_offset(self.offset)

    def __str__(self) -> str:
        parts = [] if self.outliers is None else [str(self.outliers)]
        if self.modality is not None:
            parts.append(f"modality {self.modality}")
        size, pairs = self._offset()
        if self.offset is not None:
            parts.append(f"offset {size:g} on {'+'.join(pairs)}")
        if self.value_offset is not None:
            parts.append(f"value offset {self.value_offset:g} on {'+'.join(pairs)}")
        return ", ".join(parts) or "none"


@dataclass
class _Draws:
    """How documents are continued."""

    generate: int
    temperature: float
    seed: int


def _check_kernels(formats: list[AnyFormat], device: torch.device) -> None:
    """InputError for packed formats on a GPU that this build has no kernels for."""
    from ..eval.simulate import PackedFormat

    packed = [one.name for one in formats if isinstance(one, PackedFormat)]
    if packed and device.type == "cuda" and not cuda_available():
        raise InputError(
            f"--device: {packed[0]} runs through the packed kernels, and this build has none for "
            f"{device} (OSCAR_CUDA=ON brings them); {packed[0].partition(':')[0]}-twin simulates it"
        )


def _write(
    loaded: LoadedModel,
    documents: list[Document],
    results: list[FormatResult],
    prompt: int,
    draws: _Draws | None,
    stress: str,
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """The results as files; on the screen unless JSON goes there."""
    from ..eval.report import write_report
    from ..eval.settings import content, run_settings

    along = {"along": "text"} if draws is None else {"along": "generation", **asdict(draws)}
    settings = run_settings(
        loaded.model, loaded.name, loaded.path, documents, prompt, **along, stress=stress
    )
    if html_file is not None:
        write_report(html_file, results, settings)
    to_screen = json_file is not None and str(json_file) == "-"
    if json_file is not None:
        lines = json.dumps(content(results, settings), indent=1)
        print(lines) if to_screen else json_file.write_text(lines + "\n", encoding="utf-8")
    if not to_screen:
        _show(results, settings)


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
    loaded: LoadedModel,
    documents: list[Document],
    formats: list[AnyFormat],
    prompt: int,
    draws: _Draws | None,
) -> tuple[list[Document], list[FormatResult]]:
    """The documents as they were measured, and the results."""
    from ..eval.generation import continue_documents
    from ..eval.kl import evaluate

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    total = len(documents) * (len(formats) + (2 if draws is None else 3))
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("", total=total)
        started = False

        def advance(line: str) -> None:
            nonlocal started
            progress.update(task, description=line, advance=1 if started else 0)
            started = True

        if draws is not None:
            count, temperature, seed = draws.generate, draws.temperature, draws.seed
            documents = continue_documents(
                loaded.model, documents, prompt, count, temperature, seed, advance
            )
        results = evaluate(loaded.model, documents, formats, prompt, advance)
        progress.update(task, completed=total, description="done")
    return documents, results


def _show(results: list[FormatResult], settings: dict[str, Any]) -> None:
    from ..eval.report import COLUMNS, cells, heading, sorted_by_bits

    table = Table(title=heading(settings), title_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right")
    for result in sorted_by_bits(results):
        table.add_row(*cells(result), style="bold" if result.real else None)
    Console(highlight=False).print(table)
