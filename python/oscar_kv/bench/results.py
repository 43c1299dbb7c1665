# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps results: JSON lines in a file that carries the CPU's name."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from pathlib import Path

import torch

from .. import __version__
from .attention import Row


def cpu_name() -> str:
    """The processor as the operating system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the working folder's commit, empty outside of a repository."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def save_results(rows: list[Row], folder: Path) -> Path:
    """Appends a line for each row to ``folder/attention-<cpu>.jsonl`` and returns that path."""
    cpu = cpu_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"attention-{re.sub(r'[^A-Za-z0-9]+', '-', cpu).strip('-')}.jsonl"
    where = {
        "cpu": cpu,
        "commit": commit(),
        "version": __version__,
        "torch": torch.__version__,
    }
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row.as_dict(), **where}) + "\n")
    return path
