# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Writes the compatibility table of docs/models.md from the results of tests/python/families.

.venv/bin/python scripts/models_table.py            # runs the tests (a minute), writes the table
.venv/bin/python scripts/models_table.py report.xml # from what pytest --junitxml=report.xml wrote
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- made by scripts/models_table.py -->", "<!-- end of the table -->"

TESTS = [
    "test_family_exact.py",
    "test_family_packed.py",
    "test_family_enable.py",
]  # rows come in their order
# Heading of a column -> the test it stands for.
CHECKS = {
    "stock": "test_greedy",
    "beams": "test_beam_search",
    "crop": "test_prompt_lookup_decoding_crops",
    "chunks": "test_prompt_in_chunks",
    "turns": "test_several_turns",
    "packed": "test_fused_equals_dequantise_then_attend",
    "bytes": "test_what_is_held",
}


@dataclass
class Row:
    """What the tests of one family said. checks: test -> whether all of its cases passed."""

    family: str
    model: str = ""
    survey: str = ""
    refused: str = ""
    inputs: list[str] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)

    def cells(self) -> list[str]:
        """One a column, without the family's name."""
        packed, _, kept = self.survey.partition("; not packed: ")
        marks = [
            {None: "", True: "yes", False: "**no**"}[self.checks.get(test)]
            for test in CHECKS.values()
        ]
        layers = packed.removesuffix(" layers packed")
        return [f"`{self.model}`", layers, kept, ", ".join(self.inputs), *marks]


def read_report(path: Path) -> list[Row]:
    """The families of a JUnit report, in the order of the tests."""
    rows: dict[str, Row] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        notes = {item.get("name", ""): item.get("value", "") for item in case.iter("property")}
        if "family" not in notes:
            continue
        row = rows.setdefault(notes["family"], Row(notes["family"]))
        row.model = notes["model"]
        row.survey = notes.get("survey", row.survey)
        row.refused = notes.get("refused", row.refused)
        passed = not any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))
        row.checks[notes["check"]] = row.checks.get(notes["check"], True) and passed
        if "input" in notes:
            row.inputs.append(notes["input"])
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """Two Markdown tables: what works, and what is refused."""
    header = ["family", "class", "layers packed", "not packed", "inputs compared", *CHECKS]
    lines = [_line(header), "|" + " --- |" * len(header)]
    lines += [_line([row.family, *row.cells()]) for row in rows if not row.refused]
    lines += ["", "| refused | class | message |", "|" + " --- |" * 3]
    lines += [_line([row.family, f"`{row.model}`", row.refused]) for row in rows if row.refused]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(text: str, page: Path = PAGE) -> None:
    """Puts the table between its marks."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Exit code of the tests."""
    if len(sys.argv) > 1:
        write(table(read_report(Path(sys.argv[1]))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [str(ROOT / "tests" / "python" / "families" / name) for name in TESTS]
        options = ["-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        code = subprocess.run([sys.executable, "-m", "pytest", *tests, *options]).returncode
        write(table(read_report(report)))
    return code


if __name__ == "__main__":
    sys.exit(main())
