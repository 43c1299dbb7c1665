# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar eval`: the accuracy laboratory, a subcommand a question."""

from __future__ import annotations

import typer

from .common import guarded
from .eval_kl import kl
from .eval_lm import lm
from .eval_longbench import longbench
from .eval_mmau_pro import mmau_pro
from .eval_ocrbench import ocrbench
from .eval_ruler import ruler
from .eval_table import table

evaluation = typer.Typer(no_args_is_help=True, help="Measure what cache formats cost in accuracy.")


@evaluation.callback()
def group() -> None:
    """Measure what cache formats cost in accuracy."""


for _command in (kl, table, ruler, lm, longbench, ocrbench, mmau_pro):
    evaluation.command()(guarded(_command))
