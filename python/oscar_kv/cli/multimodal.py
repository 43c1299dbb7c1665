# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Loads a model that takes images or sounds, with its processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import InputError, progress_bar
from .models import LoadedModel, quiet

if TYPE_CHECKING:
    import torch


@dataclass
class LoadedMultimodal(LoadedModel):
    """A model in evaluation mode with its processor; the tokenizer is the processor's."""

    processor: Any = None


def load_multimodal(path: Path | None, dtype: torch.dtype | None = None) -> LoadedMultimodal:
    """The model in the folder `path`; dtype None: as it was saved."""
    if path is None:
        raise InputError("--model is needed: the demo model takes neither images nor sounds")
    if not (path / "config.json").is_file():
        raise InputError(f"--model: {path} has no config.json; name a checkpoint's folder")
    with progress_bar(f"reading {path.name}"), quiet():
        from transformers import AutoModelForMultimodalLM, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(path, local_files_only=True)
            model = AutoModelForMultimodalLM.from_pretrained(
                path, local_files_only=True, dtype=dtype or "auto"
            )
        except Exception as error:  # transformers raises nearly anything for a broken file
            raise InputError(f"--model: cannot load {path}: {error}") from error
    if not hasattr(processor, "tokenizer"):
        raise InputError(f"--model: {path} has a tokenizer but no processor: it is for text only")
    return LoadedMultimodal(path.name, model.eval(), processor.tokenizer, processor)
