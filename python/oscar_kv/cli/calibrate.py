# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar calibrate`: measures the balance of a model and saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..balance import calibrate as measure
from ..eval.tasks.haystack import local_text
from .common import InputError, ModelOption, ThreadsOption, prefill_bar, read_text, set_threads
from .models import load_model


def calibrate(
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="Where to write, *.safetensors.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to measure on; without it Python's documentation.",
        ),
    ] = None,
    model: ModelOption = None,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of the text to use at most.")] = 4096,
    threads: ThreadsOption = None,
) -> None:
    """Measure balance, center and error compensation of a model, into a file.

    The balance of Q and K makes the packed cache independent of how a model shares its scale
    between the two; a center takes off keys what large biases put into them. Without a file each
    cache measures its own prompt. 1000 tokens of any text are enough; the file belongs to the model
    it was measured on.

    Example: oscar calibrate --model ./checkpoint --text book.txt --output balance.safetensors
    """
    set_threads(threads)
    content = local_text() if text is None else read_text(text, "--text")
    if not output.parent.is_dir():
        raise InputError(f"--output: folder {output.parent} does not exist")
    loaded = load_model(model)
    if text is None:
        tokens = min(tokens, loaded.most_tokens() or tokens)
        content = content[: 16 * tokens]
    ids = loaded.encode(content)[:, :tokens]
    loaded.check_length(ids.shape[1])
    with prefill_bar(f"measuring on {ids.shape[1]} tokens", loaded.model), torch.inference_mode():
        balance = measure(loaded.model, ids)
    balance.save(output)
    print(
        f"{output}: balance of {len(balance.factors)} layers, {balance.kv_heads} KV heads, "
        f"head_dim {balance.head_dim}, measured on {ids.shape[1]} tokens; "
        f"{balance.centered_heads()} heads with a center"
    )
