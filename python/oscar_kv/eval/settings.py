# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What a run of the laboratory stands on, kept beside its figures: model, texts, versions."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__, _core, active_backend
from .kl import Document, FormatResult

# Settings that every row repeats: rows of several files can then be told apart.
ROW_SETTINGS = (
    "model",
    "model_sha256",
    "tokens",
    "prompt",
    "documents_sha256",
    "along",
    "stress",
    "device",
)
_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin")  # the first kind that a folder has


def run_settings(
    model: PreTrainedModel,
    name: str,
    path: Path | None,
    documents: Sequence[Document],
    prompt: int,
    **more: Any,
) -> dict[str, Any]:
    """Everything that the figures depend on, ready for JSON.

    name, path: of the model (None: no file). documents: as measured, all of the same length. more:
    settings of the caller, such as along and stress.
    """
    device = model.device
    return {
        "model": name,
        "model_sha256": None if path is None else model_sha256(path),
        "tokens": documents[0].ids.shape[1],
        "prompt": prompt,
        "documents": [document.name for document in documents],
        "documents_sha256": _documents_sha256(documents),
        **more,
        "device": device.type,
        "device_name": _device_name(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": active_backend(),
        "commit": source_commit(),
        "oscar_kv": __version__,
        "tile_format": _core.format_version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def content(results: Sequence[FormatResult], settings: dict[str, Any]) -> dict[str, Any]:
    """What a JSON file of results holds: the settings, and a row a format."""
    repeated = {name: settings[name] for name in ROW_SETTINGS}
    return {"settings": settings, "rows": [result.row() | repeated for result in results]}


@functools.cache
def model_sha256(path: Path) -> str:
    """SHA-256 of the weights at `path`, a file or a folder; of several files in the order of names.

    The same as ``cat FOLDER/*.safetensors | sha256sum``. Once a process. ValueError for a folder
    without weights.
    """
    digest = hashlib.sha256()
    for file in _weights(path):
        with file.open("rb") as data:
            while piece := data.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for pattern in _WEIGHTS:
        if files := sorted(path.glob(pattern)):
            return files
    raise ValueError(f"{path} has no weights: none of {', '.join(_WEIGHTS)}")


def _documents_sha256(documents: Sequence[Document]) -> str:
    """Of all token ids, int64 in the machine's order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.ids.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


@functools.cache
def source_commit() -> str | None:
    """``git describe`` of the checkout that this package's files are those of, else None.

    A package that was installed from a checkout into an environment inside it counts as long as
    both hold the same Python files.
    """
    package = Path(__file__).resolve().parents[1]
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    source = Path(top) / "python" / package.name
    same = all(
        (source / file.relative_to(package)).is_file()
        and (source / file.relative_to(package)).read_bytes() == file.read_bytes()
        for file in package.rglob("*.py")
    )
    return _git(package, "describe", "--always", "--dirty") if same else None


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    calm = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}  # somebody may be committing
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, env=calm)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
