# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""enable / disable: what they change, what they put back, and which models they refuse."""

from __future__ import annotations

import copy
from typing import Any

import oscar_kv
import pytest
import torch
import transformers
from models import enabled, generate, logits_of, prompt, tiny
from transformers import DynamicCache


def attention_of(model: Any) -> str:
    return str(model.config._attn_implementation)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_disable_restores(family: str) -> None:
    model, ids = tiny(family), prompt(40)
    before, stock = attention_of(model), generate(model, ids)
    assert oscar_kv.enable(model) is model
    assert attention_of(model) == "oscar"
    assert oscar_kv.disable(model) is model
    assert attention_of(model) == before
    assert "generate" not in vars(model)
    after = generate(model, ids)
    assert type(after.past_key_values) is DynamicCache
    assert torch.equal(logits_of(after), logits_of(stock))
    oscar_kv.disable(model)  # once more changes nothing


def test_enable_twice_replaces_the_settings() -> None:
    model = tiny("llama")
    before = attention_of(model)
    oscar_kv.enable(model, format="k4v4", window=64)
    oscar_kv.enable(model, sinks=2)
    shared = generate(model, prompt(40), new=2).past_key_values.shared
    assert (shared.format, shared.window, shared.sinks) == ("k2v2", 32, 2)
    oscar_kv.disable(model)
    assert attention_of(model) == before


def test_own_generate_of_an_instance_survives() -> None:
    model = tiny("llama")
    calls = []

    def own(*args: Any, **kwargs: Any) -> str:
        calls.append(type(kwargs.get("past_key_values")).__name__)
        return "own"

    model.generate = own
    with enabled(model):
        assert model.generate(prompt(4)) == "own"
    assert model.generate is own
    assert calls == ["OscarCache"]


def test_copied_model_generates_with_its_own_weights() -> None:
    model = tiny("llama")
    with enabled(model):
        twin = copy.deepcopy(model)
        assert twin.generate.__self__ is twin
        oscar_kv.disable(twin)
        assert attention_of(model) == "oscar"
        assert attention_of(twin) == "sdpa"


def test_generate_options() -> None:
    model, ids = tiny("llama"), prompt(40)
    with enabled(model):
        assert generate(model, ids, new=2, use_cache=False).past_key_values is None
        own = oscar_kv.OscarCache(model.config, format="k4v4")
        assert generate(model, ids, new=2, past_key_values=own).past_key_values is own
        stock = DynamicCache(config=model.config)
        assert generate(model, ids, new=2, past_key_values=stock).past_key_values is stock
        first = generate(model, ids, new=2).past_key_values
        assert generate(model, ids, new=2).past_key_values is not first
        with pytest.raises(ValueError, match="cache_implementation='static'"):
            generate(model, ids, cache_implementation="static")


def test_cache_implementation_of_a_checkpoint_is_set_aside() -> None:
    model = tiny("llama")
    model.generation_config.cache_implementation = "static"
    with enabled(model):
        out = generate(model, prompt(40), new=2)
    assert isinstance(out.past_key_values, oscar_kv.OscarCache)
    assert model.generation_config.cache_implementation == "static"


def test_plain_forward_is_stock_attention() -> None:
    model, ids = tiny("llama"), prompt(40)
    with torch.no_grad():
        expected = model(ids).logits
        with enabled(model):
            torch.testing.assert_close(model(ids).logits, expected)


def test_vision_tower_keeps_its_attention() -> None:
    text = tiny("llama").config
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=96,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = prompt(60).clamp(max=95)
    ids[:, 5:9] = 96
    pixels = torch.randn(1, 3, 28, 28)
    stock = generate(model, ids, pixel_values=pixels)
    with enabled(model, window=512):
        assert model.config.vision_config._attn_implementation == "sdpa"
        out = generate(model, ids, pixel_values=pixels)
    torch.testing.assert_close(logits_of(out), logits_of(stock), rtol=0, atol=1e-4)
    assert out.past_key_values.dequantizations == 0


def test_output_attentions_is_refused() -> None:
    model = tiny("llama")
    with enabled(model), pytest.raises(ValueError, match="output_attentions"):
        model(prompt(10), output_attentions=True)


def test_dropout_and_bias_over_history_are_refused() -> None:
    from oscar_kv.hf.attention import oscar_attention_forward

    model = tiny("llama")
    cache = oscar_kv.OscarCache(model.config)
    module = model.model.layers[0].self_attn
    k, q = torch.randn(1, 2, 40, 64), torch.randn(1, 4, 40, 64)
    oscar_attention_forward(module, q, *cache.update(k, k, 0), None)
    handles = cache.update(k[:, :, :2], k[:, :, :2], 0)
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.1"):
        oscar_attention_forward(module, q[:, :, :2], *handles, None, dropout=0.1)
    with pytest.raises(NotImplementedError, match="position_bias"):
        oscar_attention_forward(module, q[:, :, :2], *handles, None, position_bias=torch.ones(1))
    with pytest.raises(NotImplementedError, match="is_causal=False"):
        oscar_attention_forward(module, q[:, :, :2], *handles, None, is_causal=False)


REFUSED: dict[str, tuple[Any, str]] = {
    "headless": (lambda: tiny("llama").model, "LlamaModel cannot generate"),
    "all_sliding": (lambda: tiny("mistral", sliding_window=16), "sliding_window=16"),
    "ratio": (
        lambda: tiny("llama", num_attention_heads=32, num_key_value_heads=1),
        "32 query heads over 1 KV heads.*from 1 to 16",
    ),
    "small_head": (lambda: tiny("llama", head_dim=16), "head_dim is 16"),
    "odd_head": (lambda: tiny("llama", head_dim=40), "head_dim is 40"),
    "large_head": (lambda: tiny("llama", head_dim=512), "head_dim is 512"),
    "float64": (lambda: tiny("llama").double(), "float64"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_models_that_are_refused(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    before = attention_of(model)
    with pytest.raises(ValueError, match=message):
        oscar_kv.enable(model)
    assert attention_of(model) == before
    assert "generate" not in vars(model)


def test_what_is_not_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match="got Linear"):
        oscar_kv.enable(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"format": "q4"}, {"window": -5}, {"sinks": 99}, {"balance": "no such file"}]
)
def test_bad_settings_leave_the_model_alone(settings: dict[str, Any]) -> None:
    model = tiny("llama")
    with pytest.raises((ValueError, FileNotFoundError), match=str(next(iter(settings.values())))):
        oscar_kv.enable(model, **settings)
    assert attention_of(model) == "sdpa"
    assert "generate" not in vars(model)
