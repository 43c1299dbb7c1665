# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Optional packages: imported where they are needed, with a message that says how to get them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


class MissingPackageError(ValueError):
    """A package of the extra "eval" is not installed."""


def check(module: str) -> None:
    """Raises MissingPackageError if the package of `module` is not installed; imports nothing."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise MissingPackageError(
            f"the package that holds {module!r} is not installed: "
            "pip install 'oscar-kv[eval]' brings what the evaluations need"
        )


def need(module: str) -> Any:
    """The imported module; raises MissingPackageError without it."""
    check(module)
    return importlib.import_module(module)
