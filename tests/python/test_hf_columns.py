# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Which columns of a batch are tokens, read off masks; and masks that cannot be honoured."""

from __future__ import annotations

import sys
from typing import Any

import oscar_kv
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import enabled, left_padded, prompt, tiny
from oscar_kv.hf.attention import oscar_attention_forward
from oscar_kv.hf.columns import ALL_REAL, StepMemo, analyse
from oscar_kv.hf.handle import Handle
from torch import Tensor
from transformers.masking_utils import (
    sdpa_mask,
    sliding_window_causal_mask_function,
)


def mask_of(tokens: Tensor, history: int, **kwargs: Any) -> Tensor | None:
    """transformers' own mask for a 2D mask [batch, columns] of 0 and 1."""
    batch, columns = tokens.shape
    return sdpa_mask(
        batch, columns - history, columns, q_offset=history, attention_mask=tokens.bool(), **kwargs
    )


def test_no_mask_means_no_padding() -> None:
    assert analyse(None, None, (2, 5), 0) is ALL_REAL
    assert analyse(None, None, (2, 1), 9) is ALL_REAL


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3))
def test_columns_of_prompt_chunk_and_token(rows: list[list[bool]]) -> None:
    """Any pattern of padding, cut into a prompt of 4, a chunk of 3 and two single tokens."""
    tokens = torch.tensor(rows)
    batch, columns, done = len(rows), None, 0
    for new in (4, 3, 1, 1):
        upto = tokens[:, : done + new]
        mask = mask_of(upto, done, allow_is_causal_skip=False)
        step = analyse(mask, columns, (batch, new), done)
        real = tokens[:, done : done + new]
        stored = step.columns if step.columns is not None else torch.ones_like(upto)
        assert torch.equal(stored, upto)
        if bool(real.all()):
            assert step.rows is None
        else:
            assert step.rows is not None
            assert step.query_start == [0, *real.sum(1).cumsum(0).tolist()]
            assert torch.equal(step.rows, real.flatten().nonzero()[:, 0])
        columns, done = step.columns, done + new


def test_additive_masks() -> None:
    tokens = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    mask = mask_of(tokens, 2)
    assert mask is not None
    low = torch.finfo(torch.float32).min
    additive = torch.zeros(mask.shape).masked_fill(~mask, low)
    step = analyse(additive, tokens[:, :2].bool(), (2, 2), 2)
    assert step.columns is not None
    assert torch.equal(step.columns, tokens.bool())
    additive[0, 0, 0, 1] = -1.5
    with pytest.raises(NotImplementedError, match="bias"):
        analyse(additive, tokens[:, :2].bool(), (2, 2), 2)


def test_sliding_window_masks() -> None:
    tokens = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    mask = mask_of(tokens, 5, mask_function=sliding_window_causal_mask_function(3), local_size=3)
    history = tokens[:, :5].bool()
    step = analyse(mask, history, (2, 3), 5, sliding_window=3)
    assert step.rows is None
    assert step.sliding_window == 3
    full = mask_of(tokens, 5)  # the model names a window, its mask does not have one
    assert analyse(full, history, (2, 3), 5, sliding_window=3).sliding_window == 0
    with pytest.raises(NotImplementedError, match="row 0 is not causal"):
        analyse(mask, history, (2, 3), 5)


def test_bidirectional_block_over_history() -> None:
    mask = torch.ones(2, 1, 3, 8, dtype=torch.bool).tril(5)
    assert analyse(mask, None, (2, 3), 5) is ALL_REAL
    mask[1, 0, 0, 7] = True
    with pytest.raises(NotImplementedError, match=r"row 1 is not causal.*bidirectional"):
        analyse(mask, None, (2, 3), 5)
    assert analyse(mask[..., 5:], None, (2, 3), 0) is ALL_REAL  # a prompt may have any mask


def test_token_masked_after_it_was_cached() -> None:
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    mask[..., 2] = False
    with pytest.raises(NotImplementedError, match="masked after they were cached"):
        analyse(mask, None, (1, 1), 5)


def test_shapes_that_are_not_masks() -> None:
    with pytest.raises(NotImplementedError, match=r"\[batch, 1, 1, 6\]"):
        analyse(torch.ones(1, 1, 1, 5, dtype=torch.bool), None, (1, 1), 5)
    with pytest.raises(NotImplementedError, match="same for all heads"):
        analyse(torch.ones(1, 4, 1, 6, dtype=torch.bool), None, (1, 1), 5)


def test_forgotten_mask_of_a_padded_cache() -> None:
    model = tiny("llama")
    ids, mask = left_padded(prompt(40, batch=2), [0, 9])
    with enabled(model), torch.no_grad():
        cache = oscar_kv.OscarCache(model.config)
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="pass the mask of all 41 columns"):
            model(prompt(1, batch=2), past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_queries_of_padding_get_zero(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prompt (sdpa and eager) and in a chunk over history."""
    model = tiny(family)
    outputs = []
    module = sys.modules[type(model).__module__]
    ours = oscar_attention_forward

    def recorded(layer: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        packed = isinstance(k, Handle)
        out, weights = ours(layer, q, k, *args, **kwargs)
        if packed:
            outputs.append(out)
        return out, weights

    tokens = torch.ones(2, 50, dtype=torch.long)
    tokens[1, :9] = tokens[0, 40:43] = 0
    interface = module.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setattr(interface, "get_interface", lambda *_: recorded)
    with enabled(model), torch.no_grad():
        cache = oscar_kv.OscarCache(model.config)
        ids = prompt(50, batch=2)
        model(ids[:, :40], attention_mask=tokens[:, :40], past_key_values=cache)
        assert outputs[-1][1, :9].abs().max() == 0
        assert outputs[-1][1, 9:].abs().max() > 0
        model(ids[:, 40:], attention_mask=tokens, past_key_values=cache)
        assert outputs[-1][0, :3].abs().max() == 0
        assert outputs[-1][0, 3:].abs().min(-1).values.max() > 0


def test_padding_never_makes_nan() -> None:
    model = tiny("gemma2")
    ids, mask = left_padded(prompt(40, batch=2), [0, 39])
    with enabled(model), torch.no_grad():
        out = model(ids, attention_mask=mask, past_key_values=oscar_kv.OscarCache(model.config))
    assert torch.isfinite(out.logits).all()


def test_crop_of_uneven_rows_is_refused() -> None:
    model = tiny("llama")
    ids, _ = left_padded(prompt(20, batch=2), [0, 0])
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0  # padding on the right
    with enabled(model), torch.no_grad():
        cache = oscar_kv.OscarCache(model.config)
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match=r"different numbers of tokens \[5, 2\]"):
            cache.crop(-5)
        cache.crop(-20)
    assert cache.get_seq_length() == 0


def test_memo_analyses_a_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return analyse(*args)

    monkeypatch.setattr("oscar_kv.hf.columns.analyse", counted)
    model = tiny("llama", num_hidden_layers=4)
    ids, mask = left_padded(prompt(40, batch=2), [0, 9])
    with enabled(model), torch.no_grad():
        cache = oscar_kv.OscarCache(model.config)
        model(ids, attention_mask=mask, past_key_values=cache)
        assert len(calls) == 1
        for new in range(1, 3):
            longer = torch.cat([mask, mask.new_ones(2, new)], 1)
            model(prompt(1, batch=2), attention_mask=longer, past_key_values=cache)
        assert len(calls) == 3
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        longer = torch.cat([mask[[1, 0]], mask.new_ones(2, 1)], 1)
        model(prompt(1, batch=2), attention_mask=longer, past_key_values=cache)
        assert len(calls) == 4


def test_memo_tells_masks_and_histories_apart() -> None:
    memo = StepMemo()
    tokens = torch.tensor([[0, 1, 1], [1, 1, 1]])
    mask = mask_of(tokens, 0)
    first = memo.step(mask, None, (2, 3), 0, 0)
    assert memo.step(mask, None, (2, 3), 0, 0) is first
    other = mask_of(tokens.flip(0), 0)
    second = memo.step(other, None, (2, 3), 0, 0)
    assert second.query_start == [0, 3, 5]
    assert first.query_start == [0, 2, 5]
