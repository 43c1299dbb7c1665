# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""How the tests run a family's model."""

from __future__ import annotations

from typing import Any

import oscar_kv
import torch
from family import Family, Inputs
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, EncoderDecoderCache

WINDOW = 512  # longer than any text here: nothing is read packed
TOLERANCE = 3e-4  # float32 noise on logits of standard deviation 0.3 to 3; measured: 1.4e-4
NEW = 8


def run(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    """Greedy generation of NEW tokens, logits kept."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(**inputs, **(options | kwargs))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert expected.std() > 0.3, "logits too flat to show an error"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def fresh_cache(family: Family, **settings: Any) -> tuple[Any, oscar_kv.OscarCache]:
    """(what the model takes as past_key_values, our part of it)"""
    ours = oscar_kv.OscarCache(family.built.model.config, **settings)
    if family.is_encoder_decoder:
        return EncoderDecoderCache(ours, DynamicCache()), ours
    return ours, ours


@torch.no_grad()
def read(family: Family, inputs: Inputs, cache: Any) -> None:
    """Runs a prompt through the model."""
    family.built.model(**inputs, past_key_values=cache, use_cache=True)


@torch.no_grad()
def step(family: Family, inputs: Inputs, cache: Any, new: Tensor) -> Tensor:
    """Logits of `new` token ids [1, tokens]; inputs: what comes with them, for an encoder-decoder
    the encoder's."""
    model, inputs = family.built.model, dict(inputs)
    if "token_type_ids" in inputs:  # Gemma's masks want those of the history too; text is 0
        types = inputs["token_type_ids"]
        inputs["token_type_ids"] = pad(types, (cache.get_seq_length(), 0))
    name = "decoder_input_ids" if family.is_encoder_decoder else "input_ids"
    out = model(**(inputs | {name: new}), past_key_values=cache, use_cache=True)
    logits: Tensor = out.logits
    return logits
