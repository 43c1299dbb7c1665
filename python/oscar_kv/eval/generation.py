# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Documents that the model wrote itself: KL along its own generation.

The exact model reads a prompt and draws tokens, one at a time, from its exact cache. The prompt
with these tokens is a document like any other, scored by teacher forcing (kl.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .kl import Document, OutputHead, no_tf32


def continue_documents(
    model: PreTrainedModel,
    documents: Sequence[Document],
    prompt: int,
    count: int,
    temperature: float = 1.0,
    seed: int = 0,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Document]:
    """The first `prompt` tokens of each document with `count` drawn ones behind them.

    temperature, seed: see `sample`; every document draws numbers of its own. advance is called with
    a line of text before each document. ValueError for a document without that many tokens.
    """
    result = []
    for number, document in enumerate(documents):
        advance(f"{document.name}: generating")
        ids = document.ids[:, :prompt]
        if ids.shape[1] < prompt:
            raise ValueError(f"{document.name} has {ids.shape[1]} tokens, prompt is {prompt}")
        drawn = sample(model, ids, count, temperature, 1_000_003 * seed + number)
        result.append(replace(document, ids=torch.cat([ids.cpu(), drawn], 1)))
    return result


@torch.inference_mode()
@no_tf32()
def sample(
    model: PreTrainedModel, ids: Tensor, count: int, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """`count` tokens after ids [1, tokens] from the exact cache, int64 [1, count] on the CPU.

    temperature: logits are divided by it; 0 takes the most likely token. The same seed draws the
    same tokens; tokens that end a text are never drawn. ValueError for a temperature below 0, a
    count below 1, or ids of another shape.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, must be at least 0")
    if count < 1:
        raise ValueError(f"count is {count}, must be at least 1")
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise ValueError(f"ids has shape {list(ids.shape)}, must be [1, tokens]")
    head, ends = OutputHead(model), _end_tokens(model)
    cache = DynamicCache(config=model.config)
    # One number a token, drawn on the CPU: the same tokens on every device, up to rounding.
    numbers = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, step = [], ids
    for number in numbers:
        output = model.base_model(
            input_ids=step.to(model.device), past_key_values=cache, use_cache=True
        )
        logits = head(output.last_hidden_state[0, -1:])[0].double().cpu()
        logits[ends] = -torch.inf
        step = _draw(logits, temperature, number)[None, None]
        found.append(step)
    return torch.cat(found, 1)


def _draw(logits: Tensor, temperature: float, number: Tensor) -> Tensor:
    """The token where the cumulative probability passes `number`, 0 <= number < 1."""
    if temperature == 0:
        return logits.argmax()
    cumulated = (logits / temperature).softmax(0).cumsum(0)
    return torch.searchsorted(cumulated, number * cumulated[-1], right=True)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    """Tokens that end a text."""
    sources = (model.generation_config, model.config.get_text_config(decoder=True))
    values = [getattr(source, "eos_token_id", None) for source in sources]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return sorted({one for group in lists for one in group if one is not None})
