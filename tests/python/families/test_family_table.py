# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The compatibility table of docs/models.md: how it is made, and that it is of this version."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from catalogue import ALL
from oscar_kv.hf import survey

ROOT = Path(__file__).resolve().parents[3]

_REPORT = """<testsuites><testsuite>
<testcase name="test_greedy[A-one]"><properties><property name="family" value="A"/>
<property name="check" value="test_greedy"/><property name="model" value="AModel"/>
<property name="survey" value="1 of 2 layers packed; not packed: 0 (linear attention)"/>
<property name="input" value="text"/></properties></testcase>
<testcase name="test_greedy[A-batch]"><properties><property name="family" value="A"/>
<property name="check" value="test_greedy"/><property name="model" value="AModel"/>
<property name="survey" value="1 of 2 layers packed; not packed: 0 (linear attention)"/>
<property name="input" value="batch"/></properties>{failure}</testcase>
<testcase name="test_refused[B]"><properties><property name="family" value="B"/>
<property name="check" value="test_refused"/><property name="model" value="BModel"/>
<property name="refused" value="BModel: no"/></properties></testcase>
<testcase name="other"/></testsuite></testsuites>"""


def script() -> Any:
    name = "models_table"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_rows_say_what_the_report_says(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    expected = "| A | `AModel` | 1 of 2 | 0 (linear attention) | text, batch | {} |  |  |"
    for failure, mark in (("", "yes"), ("<failure/>", "**no**"), ("<skipped/>", "**no**")):
        file.write_text(_REPORT.format(failure=failure), encoding="utf-8")
        made = script().table(script().read_report(file))
        assert expected.format(mark) in made
        assert "| B | `BModel` | BModel: no |" in made


def test_table_goes_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{script().START}\nold\n{script().END}\nb\n", encoding="utf-8")
    script().write("new", page)
    assert page.read_text(encoding="utf-8") == f"a\n{script().START}\nnew\n{script().END}\nb\n"


def test_page_lists_the_families_of_the_tests() -> None:
    """Add a family, or change what is packed of one: run scripts/models_table.py again."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = {row[0]: row for row in rows if len(row) > 2 and row[1].startswith("`")}
    assert sorted(found) == sorted(family.title for family in ALL)
    for family in ALL:
        row = found[family.title]
        assert row[1] == f"`{type(family.built.model).__name__}`"
        if family.refused:
            assert family.refused in row[2]
            continue
        packed, _, kept = str(survey(family.built.model.config)).partition("; not packed: ")
        assert (f"{row[2]} layers packed", row[3].strip()) == (packed, kept)
        assert "**no**" not in row
