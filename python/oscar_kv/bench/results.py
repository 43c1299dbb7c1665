# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps results: JSON lines in a file that carries the name of the CPU or GPU."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from .. import __version__


class Result(Protocol):
    """A row of any benchmark."""

    def as_dict(self) -> dict[str, object]: ...


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


def device_stem(device: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")


def save_results(rows: Sequence[Result], folder: Path, gpu: str | None = None) -> Path:
    """Appends a line for each row to ``folder/attention-<gpu or cpu>.jsonl``; returns that path."""
    device = gpu or cpu_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"attention-{device_stem(device)}.jsonl"
    where = {
        "cpu" if gpu is None else "gpu": device,
        "commit": commit(),
        "version": __version__,
        "torch": torch.__version__,
    }
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row.as_dict(), **where}) + "\n")
    return path
