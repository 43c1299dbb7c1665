# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""enable decides by what a model's layers hold: what it packs, leaves, and refuses."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import oscar_kv
import pytest
import torch
import transformers
from audio_models import ENCODER_DECODER
from catalogue import FAMILIES, each
from family import Family
from models import enabled
from oscar_kv.hf import survey
from refused_models import REFUSED
from running import run, step
from transformers import DynamicCache, EncoderDecoderCache
from vision_models import VISION

BY_TITLE = {family.title: family for family in FAMILIES}


def text_of(title: str) -> str:
    return str(survey(BY_TITLE[title].built.model.config))


def test_survey_of_mixed_layers() -> None:
    window = "sliding window of 24 tokens"
    assert text_of("Qwen3") == "2 of 2 layers packed"
    assert text_of("Gemma 2") == f"1 of 2 layers packed; not packed: 0 ({window})"
    assert text_of("Qwen3-Next") == "1 of 2 layers packed; not packed: 0 (linear attention)"
    shared = "0 (sliding window of 16 tokens), 2-3 (no K and V of its own)"
    assert text_of("Gemma 3n (text)") == f"1 of 4 layers packed; not packed: {shared}"


def config_of(title: str, **changes: Any) -> Any:
    """A copy of a family's decoder configuration with other values."""
    config = copy.deepcopy(BY_TITLE[title].built.model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_survey_goes_by_sizes_layer_by_layer() -> None:
    wide = {0: {"head_dim": 512}}
    found = survey(config_of("Qwen3", per_layer_config=wide))
    assert found.packed == (1,)
    assert "head_dim is 512" in found.kept[0]
    assert "V of width 64" in survey(config_of("Qwen3", v_head_dim=64)).kept[0]
    assert "from 1 to 16" in survey(config_of("Qwen3", num_attention_heads=17)).kept[1]


def test_layers_that_stay_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "oscar_kv"):
        with enabled(BY_TITLE["Gemma 2"].built.model):
            pass
        with enabled(BY_TITLE["Qwen3"].built.model):
            pass
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert levels == [
        (
            "WARNING",
            "Gemma2ForCausalLM: 1 of 2 layers packed; not packed: 0 (sliding window of 24 tokens) "
            "(k2v2)",
        ),
        ("INFO", "Qwen3ForCausalLM: 2 of 2 layers packed (k2v2)"),
    ]


def test_a_layer_that_cannot_be_packed_stays_dense() -> None:
    """Heads of 272 in the first layer, which no kernel takes: that one stays, and is counted."""
    config = config_of("Qwen3", per_layer_config={0: {"head_dim": 272}})
    cache = oscar_kv.OscarCache(config)
    wide, narrow = torch.randn(1, 1, 60, 272), torch.randn(1, 1, 60, 128)
    keys, _ = cache.update(wide, wide, 0)
    assert torch.equal(keys, wide)
    cache.update(narrow, narrow, 1)
    cache.commit()
    assert cache.memory().other == 2 * 60 * 272 * 4
    assert cache.memory().elements == 2 * 60 * 128


@each(REFUSED)
def test_refused_with_the_reason(family: Family, record_property: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(family.refused)) as error:
        oscar_kv.enable(family.built.model)
    assert str(error.value).startswith(type(family.built.model).__name__[:5])
    record_property("refused", str(error.value))


def test_vision_layers_of_mllama_stay() -> None:
    text = transformers.MllamaConfig().get_text_config()
    found = survey(text)
    assert set(found.kept) == set(text.cross_attention_layers)
    assert set(found.kept.values()) == {"cross-attention"}


def test_thinker_of_an_omni_model_is_enabled() -> None:
    thinker = BY_TITLE["Qwen3-Omni (thinker)"].built.model
    config = transformers.Qwen3OmniMoeConfig(enable_audio_output=False)
    config.thinker_config = thinker.config

    class Whole(transformers.Qwen3OmniMoeForConditionalGeneration):
        """With the tiny thinker, and no talker: its smallest size has hundreds of megabytes."""

        def __init__(self) -> None:
            transformers.PreTrainedModel.__init__(self, config)
            self.thinker = thinker
            self.has_talker = False

    model = Whole()
    assert oscar_kv.enable(model) is model
    try:
        inputs = BY_TITLE["Qwen3-Omni (thinker)"].built.cases["one"]()
        result = model.generate(
            **inputs,
            return_audio=False,
            thinker_max_new_tokens=4,
            thinker_return_dict_in_generate=True,
        )
        assert isinstance(result.past_key_values, oscar_kv.OscarCache)
    finally:
        assert oscar_kv.disable(model) is model
    assert "generate" not in vars(thinker)


@pytest.mark.parametrize("family", ENCODER_DECODER, ids=[x.title for x in ENCODER_DECODER])
def test_cross_attention_is_left_alone(family: Family) -> None:
    model, inputs = family.built.model, family.built.cases["one"]()
    ours = oscar_kv.OscarCache(model.config)
    with enabled(model):
        model(**inputs, past_key_values=EncoderDecoderCache(ours, cross := DynamicCache()))
        assert ours.get_seq_length() == inputs["decoder_input_ids"].shape[1]
        assert type(cross.layers[0]) is transformers.cache_utils.DynamicLayer
        again = oscar_kv.OscarCache(model.config)
        out = run(model, inputs, past_key_values=again)  # generate adds the other half
        assert again.get_seq_length() > ours.get_seq_length()
        assert out.sequences.shape[0] == 1


def test_cross_attention_never_gets_the_packed_cache() -> None:
    family = BY_TITLE["BART"]
    model, inputs = family.built.model, family.built.cases["one"]()
    with enabled(model), pytest.raises(ValueError, match="pass EncoderDecoderCache"):
        model(**inputs, past_key_values=oscar_kv.OscarCache(model.config))
    with pytest.raises(ValueError, match=r"is an encoder-decoder model: only enable"):
        oscar_kv.calibrate(model, torch.arange(64)[None])


def test_whisper_takes_a_new_cache_for_each_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording of several windows: one generate() runs the decoder once a window."""
    model = BY_TITLE["Whisper"].built.model
    sounds = torch.randn(1, 16, 500, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 500, dtype=torch.long)
    made = []
    original = oscar_kv.OscarCache.__init__

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    options = {"max_new_tokens": 6, "return_timestamps": True, "attention_mask": mask}
    model.generation_config.no_timestamps_token_id = 260
    stock = model.generate(sounds, **options)
    with enabled(model, window=512):
        monkeypatch.setattr(oscar_kv.OscarCache, "__init__", count)
        out = model.generate(sounds, **options)
    assert torch.equal(out, stock)
    assert len(made) >= 3
    assert all(0 < cache.get_seq_length() < 20 for cache in made)


def test_later_image_seen_in_both_directions() -> None:
    """Gemma 3 lets the tokens of an image see each other: over packed history no kernel can."""
    family = next(family for family in VISION if family.title == "Gemma 3 (vision)")
    model = family.built.model
    second = family.built.cases["more"]()
    del second["attention_mask"]
    ids = second.pop("input_ids")
    with enabled(model), torch.no_grad():
        cache = oscar_kv.OscarCache(model.config)
        model(**family.built.cases["long"](), past_key_values=cache)
        strict = oscar_kv.OscarCache(model.config, strict=True)
        model(**family.built.cases["long"](), past_key_values=strict)
        logits = step(family, second, cache, ids)
        assert cache.dequantizations == 1
        step(family, {}, cache, ids[:, :1])
        assert cache.dequantizations == 1  # text after it is read packed again
        with pytest.raises(NotImplementedError, match="bidirectional image blocks"):
            step(family, second, strict, ids)
    assert torch.isfinite(logits).all()
