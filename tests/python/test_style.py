# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of the source tree: formatting, lint, types, licence lines, length, dead paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent
FOLDERS = ["include", "src", "python", "tests", "bench", "examples", "scripts", "docs", ".ci"]
CODE = {".py", ".pyi", ".cpp", ".hpp", ".h", ".cu", ".cuh", ".sh"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def _files() -> list[Path]:
    inside = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*"))]
    top = sorted(ROOT.iterdir())
    return [f for f in top + inside if f.is_file() and "__pycache__" not in f.parts]


CODE_FILES = [file for file in _files() if file.suffix in CODE]
CPP_FILES = [file for file in CODE_FILES if file.suffix in {".cpp", ".hpp", ".h", ".cu", ".cuh"}]
PYTHON_FILES = [file for file in CODE_FILES if file.suffix == ".py"]
MARKDOWN_FILES = [file for file in _files() if file.suffix == ".md"]
LICENSED = CODE_FILES + [
    file
    for file in _files()
    if file.name in {"CMakeLists.txt", "Makefile", "pyproject.toml"} or file.parent.name == ".ci"
]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _check(*command: str) -> None:
    result = subprocess.run(
        [str(TOOLS / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_tree_was_found() -> None:
    assert {"format.hpp", "cache.py", "test_style.py"} <= {file.name for file in CODE_FILES}
    assert "README.md" in {file.name for file in MARKDOWN_FILES}


def test_clang_format() -> None:
    _check("clang-format", "--dry-run", "-Werror", *map(str, CPP_FILES))


def test_ruff_check() -> None:
    _check("ruff", "check", "--no-cache", *map(str, PYTHON_FILES))


def test_ruff_format() -> None:
    _check("ruff", "format", "--no-cache", "--check", *map(str, PYTHON_FILES))


def test_mypy() -> None:
    _check("mypy")


@pytest.mark.parametrize("file", LICENSED, ids=_name)
def test_licence_lines(file: Path) -> None:
    top = "\n".join(file.read_text(encoding="utf-8").splitlines()[:3])
    assert "SPDX-FileCopyrightText: 2026 The oscar-kv authors" in top
    assert "SPDX-License-Identifier: Apache-2.0" in top


def test_licence_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("file", CODE_FILES, ids=_name)
def test_file_length(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines, at most {MAX_FILE_LINES}"


@pytest.mark.parametrize("file", PYTHON_FILES, ids=_name)
def test_function_length(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.end_lineno - node.body[0].lineno + 1
            assert body <= MAX_FUNCTION_LINES, f"{node.name}: {body} lines"


def named_paths(text: str, top: set[str]) -> set[str]:
    """Paths that a Markdown text names: targets of its links, and code spans that look like one.

    A code span counts if it has a slash and starts with an entry of the root folder (`top`).
    """
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text)
    paths = {link for link in links if not re.match(r"[a-z]+:", link)}
    for span in re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", text):
        if "/" in span and span.split("/")[0] in top:
            paths.add("/" + span)
    return paths


@pytest.mark.parametrize("file", MARKDOWN_FILES, ids=_name)
def test_paths_in_markdown_exist(file: Path) -> None:
    top = {path.name for path in ROOT.iterdir()}
    for path in named_paths(file.read_text(encoding="utf-8"), top):
        target = ROOT / path[1:] if path.startswith("/") else file.parent / path
        assert target.exists(), f"{_name(file)} names {path}, which does not exist"


def test_named_paths_are_found() -> None:
    text = "![a](images/a.svg) [b](../b.md#part) [c](https://x.org/y) `src/core/x.cpp` `1/64` `src`"
    assert named_paths(text, {"src"}) == {"images/a.svg", "../b.md", "/src/core/x.cpp"}
