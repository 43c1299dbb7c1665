# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Every family with a window longer than the text: results equal the stock cache's.

Nothing is read packed then, so what differs is plumbing: masks, positions, padding, reordering.
docs/models.md is made from the results of this folder.
"""

from __future__ import annotations

import copy
from typing import Any

import oscar_kv
import pytest
import torch
from catalogue import DECODERS, FAMILIES, MEDIA, each, each_case
from family import Family
from models import enabled, logits_of
from running import NEW, TOLERANCE, WINDOW, assert_close, fresh_cache, read, run, step
from text_models import TEXT
from transformers import DynamicCache
from vision_models import VISION

BEAMS = 3


@each_case(FAMILIES)
def test_greedy(family: Family, case: str) -> None:
    model, inputs = family.built.model, family.built.cases[case]()
    stock = run(model, inputs)
    with enabled(model, window=WINDOW):
        out = run(model, inputs)
    assert torch.equal(out.sequences, stock.sequences)
    assert_close(logits_of(out), logits_of(stock))


@each(DECODERS)
def test_generate_attends_on_the_codes(family: Family) -> None:
    model, inputs = family.built.model, family.built.cases["one"]()
    with enabled(model):
        cache = run(model, inputs).past_key_values
    assert isinstance(cache, oscar_kv.OscarCache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + NEW - 1
    assert cache.dequantizations == 0


@each(FAMILIES)
def test_beam_search(family: Family) -> None:
    model, inputs = family.built.model, family.built.cases["batch"]()
    stock = run(model, inputs, num_beams=BEAMS)
    with enabled(model, window=WINDOW):
        out = run(model, inputs, num_beams=BEAMS)
    assert torch.equal(out.sequences, stock.sequences)
    torch.testing.assert_close(out.sequences_scores, stock.sequences_scores, rtol=0, atol=TOLERANCE)


@each([family for family in DECODERS if not family.stateful])
def test_prompt_lookup_decoding_crops(family: Family) -> None:
    model, inputs = family.built.model, family.built.cases["long"]()
    stock = run(model, inputs)
    with enabled(model, window=WINDOW):
        out = run(model, inputs, prompt_lookup_num_tokens=4)
    assert torch.equal(out.sequences, stock.sequences)


@each(TEXT + VISION)  # transformers does not cut sounds
def test_prompt_in_chunks(family: Family) -> None:
    model, inputs = family.built.model, family.built.cases["batch"]()
    stock = run(model, inputs, prefill_chunk_size=17)
    with enabled(model, window=WINDOW):
        out = run(model, inputs, prefill_chunk_size=17)
    assert_close(logits_of(out), logits_of(stock))


def conversation(family: Family, cache: Any) -> torch.Tensor:
    """Logits of a second question, with an image or sound of its own, and of two words after it."""
    cases = family.built.cases
    run(family.built.model, cases["one"](), past_key_values=cache)
    second = cases["more"]() if "more" in cases else {"input_ids": torch.arange(2, 32)[None]}
    second.pop("attention_mask", None)  # of these words alone; none is padding
    logits = [step(family, second, cache, second.pop("input_ids"))]
    logits += [step(family, {}, cache, torch.tensor([[token]])) for token in (5, 7)]
    return torch.cat(logits, 1)


@each(DECODERS)
def test_several_turns(family: Family) -> None:
    model = family.built.model
    stock = conversation(family, DynamicCache(config=model.config))
    with enabled(model, window=WINDOW):
        assert_close(conversation(family, fresh_cache(family, window=WINDOW)[0]), stock)


@each([family for family in TEXT if not family.stateful] + MEDIA)
def test_a_wrong_mask_shows(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would fail if padding were not masked."""
    model, inputs = family.built.model, family.built.cases["batch"]()
    expected = logits_of(run(model, inputs))
    everything = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    with enabled(model, window=WINDOW):
        wrong = logits_of(run(model, everything))
    padded = inputs["attention_mask"][:, 0] == 0
    assert padded.any()
    assert (wrong - expected)[padded].abs().max() > 100 * TOLERANCE


@each([family for family in FAMILIES if not family.positionless])
def test_a_wrong_position_shows(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model asks the cache where it is: two tokens further on the result is another."""
    model, inputs = family.built.model, family.built.cases["one"]()
    word, rest = torch.tensor([[9]]), inputs if family.is_encoder_decoder else {}
    with enabled(model, window=WINDOW):
        cache, ours = fresh_cache(family, window=WINDOW)
        read(family, inputs, cache)
        right = step(family, rest, copy.deepcopy(cache), word)
        length = ours.get_seq_length()
        monkeypatch.setattr(type(ours), "get_seq_length", lambda *_, **__: length + 2)
        wrong = step(family, rest, cache, word)
    assert (wrong - right).abs().max() > 100 * TOLERANCE
