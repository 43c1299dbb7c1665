# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The `oscar` command line: collects the subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .calibrate import calibrate
from .common import guarded
from .demo import demo
from .eval import evaluation
from .generate import generate
from .info import info
from .tni import tni

app = typer.Typer(
    name="oscar",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"oscar-kv {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """An LLM's KV cache in about 2.25 bits per element; attention runs on the packed codes.

    Exit codes: 0 done, 2 bad input (a message says what), 1 anything else.
    """


for _command in (demo, generate, calibrate, info, tni):
    app.command()(guarded(_command))
app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")


def main() -> None:
    """Entry point of the `oscar` script."""
    app()


if __name__ == "__main__":
    main()
