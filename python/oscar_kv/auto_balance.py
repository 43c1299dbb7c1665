# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The balance of a model for a serving engine that was given no file: measured once, then kept.

An engine cannot measure at its first prompt, as `OscarCache` does: pages that were packed before
would be read with other factors than they were packed with. So the model is run beforehand, by
`oscar calibrate` in a process of its own (transformers on the CPU, on text that comes with Python),
whose memory is free again when the engine takes its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import __version__

AUTO = "auto"
FOLDER = "OSCAR_KV_CACHE"  # environment variable: where measured balances are kept

_logger = logging.getLogger("oscar_kv")


def balance_file(value: str, model: str, revision: str | None = None) -> str:
    """The file that `value` names; for "auto" that of `model`, measured if it is not there yet.

    model: a folder or the name of a model in the local cache of the Hugging Face hub.
    Raises ValueError where there is none, RuntimeError where it could not be measured.
    """
    if value != AUTO:
        return value
    import filelock  # comes with torch

    folder = _local_folder(model, revision)
    kept = _kept_in() / f"{folder.name}-{_digest(folder)}.safetensors"
    kept.parent.mkdir(parents=True, exist_ok=True)
    # All ranks of an engine ask at once: one measures, the others wait.
    with filelock.FileLock(f"{kept}.lock"):
        if not kept.is_file():
            _logger.info("oscar-kv: measuring the balance of %s, once", folder)
            _measure(folder, kept)
    return str(kept)


def _kept_in() -> Path:
    given = os.environ.get(FOLDER)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oscar-kv"


def _local_folder(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model).resolve()
    from transformers.utils import cached_file

    try:
        config = cached_file(model, "config.json", revision=revision, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"balance is auto, which needs the model's files here: {model!r} is neither a folder "
            "nor in the local cache of the hub (oscar calibrate measures a balance into a file)"
        ) from error
    return Path(str(config)).parent


def _digest(folder: Path) -> str:
    """Of what a balance depends on: the release, the configuration, and which weights there are."""
    found = hashlib.sha256(f"{__version__} {folder}".encode())
    found.update((folder / "config.json").read_bytes())
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".bin"):
            stat = file.stat()
            found.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return found.hexdigest()[:16]


def _measure(folder: Path, kept: Path) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent) as work:
        output = Path(work) / "balance.safetensors"
        command = [sys.executable, "-m", "oscar_kv.cli.app", "calibrate"]
        done = subprocess.run(
            [*command, "--model", str(folder), "--output", str(output)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f"balance is auto, but measuring that of {folder} failed:\n"
                f"{(done.stdout + done.stderr)[-2000:]}"
            )
        output.replace(kept)
