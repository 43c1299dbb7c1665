# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""OscarCache as an object: memory, life cycle, and everything it refuses."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import oscar_kv
import pytest
import torch
from models import enabled, generate, left_padded, logits_of, prompt, tiny
from oscar_kv.hf.columns import unmasked_step
from oscar_kv.hf.handle import Handle
from oscar_kv.hf.layer import OscarLayer
from transformers.cache_utils import DynamicSlidingWindowLayer


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@torch.no_grad()
def filled(model: Any, tokens: int = 100, batch: int = 1, **settings: Any) -> oscar_kv.OscarCache:
    cache = oscar_kv.OscarCache(model.config, **settings)
    with enabled(model):
        model(prompt(tokens, batch), past_key_values=cache)
    return cache


def test_memory_counts_every_part(llama: Any) -> None:
    empty = oscar_kv.OscarCache(llama.config).memory()
    assert (empty.total, empty.elements, empty.bits_per_element) == (0, 0, 0.0)
    memory = filled(llama, tokens=256).memory()
    assert memory.elements == 2 * 2 * 256 * 2 * 64  # K and V, layers, tokens, KV heads, head_dim
    assert memory.packed == 2 * 2 * 2 * 4 * 1184  # layers, pages, KV heads, tiles of 1184 bytes
    assert memory.exact == 2 * 2 * 2 * (64 + 4) * 64 * 4  # layers, K and V, heads, ring + sinks
    assert memory.pending == memory.other == 0
    assert memory.total == memory.packed + memory.exact + memory.tables
    assert memory.bits_per_element == pytest.approx(8 * memory.total / memory.elements)


def test_long_prompt_costs_little_and_leaves_nothing_dense() -> None:
    model = tiny("llama", num_hidden_layers=1)
    memory = filled(model, tokens=2048).memory()
    assert memory.pending == 0
    assert 8 * memory.packed / memory.elements == pytest.approx(2.3125, rel=0.07)


def test_one_layer_is_dense_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", num_hidden_layers=4)
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    update = OscarLayer.update

    def watched(layer: OscarLayer, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> Any:
        alive.append(sum(old() is not None for old in seen))
        seen.extend([weakref.ref(k), weakref.ref(v)])
        return update(layer, k, v, **rest)

    monkeypatch.setattr(OscarLayer, "update", watched)
    filled(model)
    assert alive == [0, 0, 0, 0]


def test_sliding_layers_stay_transformers_own() -> None:
    model = tiny("gemma2")
    cache = filled(model)
    assert isinstance(cache.layers[0], DynamicSlidingWindowLayer)
    assert isinstance(cache.layers[1], OscarLayer)
    assert cache.memory().other > 0


def test_prompt_is_pending_until_read_and_freed_after(llama: Any) -> None:
    cache = oscar_kv.OscarCache(llama.config)
    k = torch.randn(1, 2, 40, 64)
    handle, _ = cache.update(k, k, 0)
    assert type(handle) is Handle
    assert handle.shape == (1, 2, 40, 64)
    assert cache.memory().pending == 2 * k.numel() * 4
    cache.commit()
    assert cache.memory().pending == 0
    assert cache.get_seq_length() == 40
    assert cache.get_mask_sizes(3, 0) == (43, 0)
    assert cache.layers[0].get_mask_sizes(torch.arange(40, 43)) == (43, 0)


def test_handles_dequantise_for_any_operation(llama: Any) -> None:
    cache = filled(llama, tokens=70)
    layer = cache.layers[0]
    keys, values = layer.paged.dequantize()
    new = torch.randn(1, 2, 1, 64)
    k, v = cache.update(new, new, 0)
    torch.testing.assert_close(k + 0, torch.cat([keys, new], 2))
    torch.testing.assert_close(v.transpose(1, 2), torch.cat([values, new], 2).transpose(1, 2))
    assert cache.dequantizations == 1  # one for both
    assert type(k.detach()) is Handle
    assert k.to(torch.float64).dtype == torch.float64
    torch.testing.assert_close(layer.keys + 0, torch.cat([keys, new], 2))


def test_padded_batch_dequantises_in_columns(llama: Any) -> None:
    ids, mask = left_padded(prompt(60, batch=2), [0, 25])
    with enabled(llama, window=512):
        out = generate(llama, ids, attention_mask=mask, new=2)
    cache = out.past_key_values
    layer = cache.layers[0]
    keys = layer.keys + 0
    stored, _ = layer.paged.dequantize()
    assert keys.shape[2] == 61
    assert keys[1, :, :25].abs().max() == 0
    assert torch.equal(keys[1, :, 25:], stored[1, :, :36])
    assert torch.equal(keys[0], stored[0])


def test_handles_are_read_only(llama: Any) -> None:
    cache = filled(llama)
    new = torch.randn(1, 2, 1, 64)
    k, _ = cache.update(new, new, 0)
    with pytest.raises(RuntimeError, match="cannot write into packed K or V"):
        k.add_(1)
    with pytest.raises(RuntimeError, match="cannot write into packed K or V"):
        k[torch.tensor([0])] = 0.0
    target = torch.empty(k.shape)
    torch.testing.assert_close(target.copy_(k), k + 0)


def test_stale_handles_are_refused(llama: Any) -> None:
    cache = filled(llama)
    new = torch.randn(1, 2, 1, 64)
    old, _ = cache.update(new, new, 0)
    cache.update(new, new, 0)
    with pytest.raises(RuntimeError, match="stale K/V of layer 0"):
        old + 0


def test_deepcopy_is_independent(llama: Any) -> None:
    cache = filled(llama)
    twin = copy.deepcopy(cache)
    with enabled(llama), torch.no_grad():
        step = prompt(1, seed=3)
        expected = llama(step, past_key_values=twin).logits
        assert twin.get_seq_length() == 101
        assert cache.get_seq_length() == 100
        assert torch.equal(llama(step, past_key_values=cache).logits, expected)


def test_reset_allows_another_batch(llama: Any) -> None:
    cache = filled(llama, batch=2)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().total == 0
    assert cache.balances == {}  # measured on tokens that are gone
    with enabled(llama), torch.no_grad():
        llama(prompt(50, batch=3), past_key_values=cache)
    assert cache.batch_size == 3


def test_another_batch_is_refused(llama: Any) -> None:
    cache = filled(llama, batch=2)
    with enabled(llama), pytest.raises(ValueError, match="holds a batch of 2, got K of batch 3"):
        llama(prompt(1, batch=3), past_key_values=cache)


def test_other_shapes_are_refused(llama: Any) -> None:
    cache = filled(llama)
    k = torch.randn(1, 2, 1, 64)
    with pytest.raises(ValueError, match="differ in shape"):
        cache.update(k, torch.randn(1, 2, 1, 32), 0)
    with pytest.raises(ValueError, match=r"expected K \[1, 2, tokens, 64\]"):
        cache.update(torch.randn(1, 4, 1, 64), torch.randn(1, 4, 1, 64), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_values_that_cannot_be_packed_leave_the_layer_as_it_was(llama: Any, bad: float) -> None:
    cache = filled(llama)
    layer = cache.layers[1]
    before = layer.paged.dequantize()[0]
    k = torch.randn(1, 2, 40, 64)
    k[0, 1, 7, 5] = bad
    cache.update(k, torch.randn_like(k), 1)
    with pytest.raises(ValueError, match="layer 1"):
        cache.commit()
    assert layer.get_seq_length() == 100
    assert torch.equal(layer.paged.dequantize()[0], before)
    good = torch.randn(1, 2, 1, 64)
    with pytest.raises(ValueError, match="this cache is incomplete, use a new one or reset"):
        cache.update(good, good, 0)
    cache.reset()
    cache.update(good, good, 0)
    assert cache.get_seq_length() == 1


def test_nan_does_not_reach_the_measured_balance(llama: Any) -> None:
    cache = oscar_kv.OscarCache(llama.config)
    layer = cache.layers[0]
    k = torch.randn(1, 2, 40, 64)
    k[0, 0, 3, 3] = float("nan")
    cache.update(k, k, 0)
    layer.observe(torch.randn(1, 4, 40, 64), unmasked_step(None, 1, 40))
    with pytest.raises(ValueError, match="layer 0"):
        cache.commit()
    assert cache.balances == {}
    assert layer.measuring is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "k3v2"}, "format is 'k3v2', must be one of k2v2"),
        ({"window": -1}, "window is -1"),
        ({"window": 1.5}, "window is 1.5"),
        ({"sinks": 33}, "sinks is 33, must be an integer from 0 to 32"),
        ({"sinks": True}, "sinks is True"),
        ({"offloading": True}, "offloading"),
    ],
)
def test_bad_settings(llama: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oscar_kv.OscarCache(llama.config, **settings)


def test_config_is_required(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"needs the model's config, got NoneType"):
        oscar_kv.OscarCache()
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        oscar_kv.OscarCache(llama)


def test_bad_balance_arguments(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got int"):
        oscar_kv.OscarCache(llama.config, balance=3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        oscar_kv.OscarCache(llama.config, balance=tmp_path / "nowhere")


def test_nothing_to_pack() -> None:
    config = tiny("mistral", sliding_window=16).config
    with pytest.raises(ValueError, match=r"sliding_window=16.*nothing would be packed"):
        oscar_kv.OscarCache(config)


def test_crop_limits(llama: Any) -> None:
    cache = filled(llama, tokens=200)
    with pytest.raises(ValueError, match=r"crop\(5\)"):
        cache.crop(5)
    with pytest.raises(ValueError, match="150"):
        cache.crop(-150)
    assert cache.get_seq_length() == 200
    cache.crop(0)
    cache.crop(-32)
    assert cache.get_seq_length() == 168


def test_offload_is_refused(llama: Any) -> None:
    with pytest.raises(NotImplementedError, match="offloaded"):
        filled(llama).layers[0].offload()


def test_no_gradient_through_packed_tokens(llama: Any) -> None:
    cache = filled(llama)
    with enabled(llama):
        logits = llama(prompt(1, seed=3), past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="no backward"):
        logits.sum().backward()
    llama.zero_grad()


def test_half_precision_models_keep_their_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny("llama").to(dtype)
        with enabled(model):
            out = generate(model, prompt(80), new=4)
        layer = out.past_key_values.layers[0]
        assert layer.paged.exact.dtype == dtype
        assert torch.isfinite(logits_of(out).float()).all()
