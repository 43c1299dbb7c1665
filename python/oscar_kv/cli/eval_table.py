# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar eval table`: what `oscar eval kl --json` wrote, as Markdown tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import InputError, read_text


def table(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What `oscar eval kl --json` wrote.")
    ],
) -> None:
    """Print kept results of `oscar eval kl` as Markdown tables, sorted by bits.

    Rows of another model, other documents or lengths, other draws or another stress stand in a
    table of their own. A format that is there several times is shown as in the last file. Bold rows
    ran through the packed kernels.

    Example: oscar eval table bench/results/accuracy-methods.json
    """
    from ..eval.report import tables

    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            content = json.loads(read_text(file, "FILE"))
            if isinstance(content, list):
                raise InputError(
                    f"FILE: {file} is a list without settings, as older releases wrote it: it does "
                    "not say what was measured, measure again with `oscar eval kl --json`"
                )
            rows += content["rows"]
            lines = tables(rows)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"FILE: {file} is not what eval kl wrote: {error!r}") from error
    print(lines)
