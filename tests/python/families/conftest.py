# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Lets these tests import the helpers of the folder above, and notes which family each is about."""

import sys
from pathlib import Path
from typing import Any

import pytest
from oscar_kv.hf import survey

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def _note(request: Any, record_property: Any) -> None:
    """What scripts/models_table.py reads in the report of the tests."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or "family" not in callspec.params:
        return
    family, case = callspec.params["family"], callspec.params.get("case")
    record_property("family", family.title)
    record_property("check", request.node.originalname)
    record_property("model", type(family.built.model).__name__)
    if case is not None:
        record_property("input", family.media if case == "one" else case)
    if not family.refused:
        record_property("survey", str(survey(family.built.model.config)))
