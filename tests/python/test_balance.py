# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Balance: the formula, the file, and who measures when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oscar_kv
import pytest
import torch
from models import backend, enabled, generate, left_padded, prompt, tiny
from oscar_kv import Balance, OscarCache, calibrate
from oscar_kv import calibration as statistics
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


@pytest.fixture
def measured(llama: Any) -> Balance:
    return calibrate(llama, prompt(100))


def test_formula() -> None:
    """sqrt(sk / sq) per RoPE pair; K's offset does not count, Q's does."""
    module = statistics
    generator = torch.Generator().manual_seed(0)
    deviation = torch.tensor([0.5, 2.0, 8.0, 1.0]).repeat(2)
    keys = torch.randn(32 * 400, 1, 8, generator=generator) * deviation + 30.0
    queries = torch.randn(9000, 4, 8, generator=generator) * 0.25
    seen = module.QueryStatistics()
    seen.observe(queries[:5000])
    seen.observe(queries[5000:])
    factors = module.balance_factors(module.key_variance([keys]), seen.mean_square(1))
    expected = (deviation / 0.25).sqrt()[None]
    torch.testing.assert_close(factors, expected, rtol=0.03, atol=0)


def test_channels_of_a_rope_pair_share_a_factor() -> None:
    variance, mean_square = torch.ones(1, 8), torch.ones(1, 8)
    variance[0, 1], mean_square[0, 6] = 31.0, 9.0
    factors = statistics.balance_factors(variance, mean_square)[0]
    expected = torch.tensor([1.0, 16.0**0.25, 5.0**-0.25, 1.0]).repeat(2)
    torch.testing.assert_close(factors, expected)


def test_query_heads_of_a_kv_head_share_a_factor() -> None:
    seen = statistics.QueryStatistics()
    q = torch.zeros(10, 4, 8)
    q[:, 0], q[:, 1], q[:, 2:] = 1.0, 3.0, 2.0
    seen.observe(q)
    torch.testing.assert_close(seen.mean_square(2)[:, 0], torch.tensor([5.0, 4.0]))


def test_key_variance_is_within_groups() -> None:
    module = statistics
    steps = torch.arange(128).div(32, rounding_mode="floor")[:, None, None].expand(-1, 1, 8) * 100.0
    assert module.key_variance([steps]).abs().max() == 0
    assert module.key_variance([steps[:31]]) is None
    noise = torch.randn(96, 1, 8, generator=torch.Generator().manual_seed(0))
    expected = noise.unflatten(0, (3, 32)).var(1, correction=0).mean(0)
    got = module.key_variance([noise[:64], noise[64:], noise[:5]])
    torch.testing.assert_close(got, expected)


def test_dead_channels_and_heads() -> None:
    module = statistics
    variance, mean_square = torch.ones(3, 8), torch.ones(3, 8)
    variance[0] = 0
    mean_square[1] = 0
    variance[2, 3] = variance[2, 7] = 0
    factors = module.balance_factors(variance, mean_square)
    assert torch.equal(factors[:2], torch.ones(2, 8))
    assert factors[2, 3] == 1 / 64
    assert bool((factors > 0).all())
    huge = module.balance_factors(torch.full((1, 8), 1e20), torch.full((1, 8), 1e-20))
    assert torch.equal(huge, torch.full((1, 8), 64.0))


def test_round_trip(llama: Any, measured: Balance, tmp_path: Path) -> None:
    file = tmp_path / "balance.safetensors"
    measured.save(file)
    loaded = Balance.load(file)
    assert loaded.model_type == "llama"
    assert (loaded.num_layers, loaded.kv_heads, loaded.head_dim) == (2, 2, 64)
    assert loaded.factors.keys() == {0, 1}
    for layer, value in measured.factors.items():
        assert value.shape == (2, 64)
        assert torch.equal(loaded.factors[layer], value)
        assert torch.equal(loaded.feedback[layer], measured.feedback[layer])
    for given in (file, str(file), loaded):
        with enabled(llama, balance=given):
            cache = generate(llama, prompt(60), new=2).past_key_values
        assert torch.equal(cache.layers[0].paged.balance, measured.factors[0])


@pytest.mark.parametrize("length", [0, 7, 100, -10])
def test_truncated_file(measured: Balance, tmp_path: Path, length: int) -> None:
    file = tmp_path / "balance.safetensors"
    measured.save(file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match="is not a readable balance file"):
        Balance.load(file)


def test_damaged_files(measured: Balance, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    good = {"format": "oscar-kv-balance", "version": "2", "model_type": "m", "shape": "[2, 2, 64]"}
    factors = {"layer.0": torch.ones(2, 64)}

    def message(tensors: dict[str, torch.Tensor], **metadata: str) -> str:
        save_file(tensors, file, metadata=good | metadata)
        with pytest.raises(ValueError, match=r"x\.safetensors") as error:
            Balance.load(file)
        return str(error.value)

    assert "format is 'other'" in message(factors, format="other")
    assert "version is '1', this release reads '2'" in message(factors, version="1")
    assert "damaged balance metadata" in message(factors, shape="[1]")
    assert "damaged balance metadata" in message({"layers": torch.ones(2, 64)})
    assert "layer 5 is not in 0..1" in message({"layer.5": torch.ones(2, 64)})
    for wrong in (0.0, torch.nan, 65.0, 1e-40, 1e30):
        text = message({"layer.0": torch.full((2, 64), wrong)})
        assert "layer 0 has a value of" in text and "from 1/64 to 64" in text
    half = torch.ones(2, 64, dtype=torch.float16)
    assert "expected torch.float32 [2, 64], found torch.float16" in message({"layer.0": half})
    assert "expected torch.float32 [2, 64]" in message({"layer.0": torch.ones(1, 64)})
    for wrong in (torch.inf, torch.nan, 65505.0, -1e9):
        text = message(factors | {"center.0": torch.full((2, 64), wrong)})
        assert "center 0 has a value of" in text and "at most 65504 in magnitude" in text
    assert "center 0: expected torch.float32 [2, 64]" in message(factors | {"center.0": half})
    assert "center 1 belongs to no layer" in message(factors | {"center.1": torch.ones(2, 64)})
    square = torch.zeros(2, 64, 64, dtype=torch.float16)
    assert "feedback 0 has a value of nan" in message(factors | {"feedback.0": square + torch.nan})
    assert "feedback 1 belongs to no layer" in message(factors | {"feedback.1": square})
    save_file(factors, file)
    with pytest.raises(ValueError, match="format is None"):
        Balance.load(file)


@pytest.mark.parametrize(
    ("family", "changes", "difference"),
    [
        ("qwen3", {}, "model_type is llama, the model has qwen3"),
        ("llama", {"num_hidden_layers": 3}, "num_layers is 2, the model has 3"),
        ("llama", {"num_key_value_heads": 1}, "kv_heads is 2, the model has 1"),
        ("llama", {"head_dim": 32}, "head_dim is 64, the model has 32"),
    ],
)
def test_balance_of_another_model(
    measured: Balance, family: str, changes: dict[str, Any], difference: str
) -> None:
    config = tiny(family, **changes).config
    with pytest.raises(ValueError, match=difference):
        OscarCache(config, balance=measured)


def test_every_call_measures_its_own_prompt(llama: Any) -> None:
    with enabled(llama):
        first = generate(llama, prompt(64), new=2).past_key_values
        assert first.balances.keys() == {0, 1}
        second = generate(llama, prompt(90, seed=8), new=2).past_key_values
        assert not torch.equal(second.balances[1], first.balances[1])
    with enabled(llama):
        fresh = generate(llama, prompt(90, seed=8), new=2).past_key_values
    for layer in (0, 1):
        assert torch.equal(fresh.balances[layer], second.balances[layer])


def test_reset_forgets_what_was_measured(llama: Any, measured: Balance) -> None:
    for given, stays in ((None, False), (measured, True)):
        cache = OscarCache(llama.config, balance=given or "auto")
        with enabled(llama), torch.no_grad():
            llama(prompt(64, seed=5), past_key_values=cache)
            old = cache.balances[1]
            for layer in cache.layers:
                layer.reset()
            llama(prompt(64, seed=6), past_key_values=cache)
        assert torch.equal(cache.balances[1], old) == stays


def test_auto_waits_for_the_first_tile(llama: Any) -> None:
    """A short prompt: measured while decoding, from the ring and the pending token."""
    with enabled(llama):
        short = generate(llama, prompt(20), new=12).past_key_values  # 31 tokens in the cache
        assert short.balances == {}
        out = generate(llama, prompt(20), new=13)  # 32
        assert out.past_key_values.balances.keys() == {0, 1}
        assert out.past_key_values.layers[0].paged.packed_tokens == 32
    whole = calibrate(llama, out.sequences[:, :32])
    torch.testing.assert_close(
        out.past_key_values.balances[0], whole.factors[0], rtol=1e-3, atol=1e-3
    )


def test_calibrate_equals_auto_and_leaves_the_model_alone(llama: Any, measured: Balance) -> None:
    assert llama.config._attn_implementation == "sdpa"
    with enabled(llama):
        cache = generate(llama, prompt(100), new=2).past_key_values
        assert torch.equal(cache.balances[1], measured.factors[1])
        again = calibrate(llama, prompt(100))
        assert llama.config._attn_implementation == "oscar"
    assert torch.equal(again.factors[0], measured.factors[0])


def test_calibrate_ignores_padding(llama: Any) -> None:
    ids, mask = left_padded(prompt(64, batch=1), [20])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = calibrate(llama, ids, attention_mask=mask, position_ids=positions)
    plain = calibrate(llama, ids[:, 20:])
    torch.testing.assert_close(padded.factors[0], plain.factors[0], rtol=1e-4, atol=1e-4)


def test_calibrate_refuses(llama: Any) -> None:
    with pytest.raises(ValueError, match="at least 32 tokens"):
        calibrate(llama, prompt(31))
    with pytest.raises(ValueError, match="at least 32 tokens"):
        calibrate(llama, prompt(64)[0])
    ids, mask = left_padded(prompt(64), [40])
    with pytest.raises(ValueError, match="not padding"):
        calibrate(llama, ids, attention_mask=mask)


def test_only_full_attention_layers_are_measured() -> None:
    assert calibrate(tiny("gemma2"), prompt(64)).factors.keys() == {1}


def test_no_balance_without_our_attention(llama: Any) -> None:
    cache = OscarCache(llama.config)
    generate(llama, prompt(64), new=2, past_key_values=cache)
    assert cache.balances == {}
    assert cache.layers[0].paged.balance is None


def test_none_means_one(llama: Any) -> None:
    with enabled(llama, balance=None):
        cache = generate(llama, prompt(64), new=2).past_key_values
    assert cache.balances == {}
    assert cache.layers[0].paged.balance is None


def test_balance_undoes_a_change_of_scale() -> None:
    """K times d and Q over d change no score; without balance they ruin the packing."""
    model = tiny("llama", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    scale = torch.ones(64)
    scale[[3, 35, 10, 42]] = 30.0
    with torch.no_grad():
        attention.k_proj.weight.mul_(scale.repeat(2)[:, None])
        attention.q_proj.weight.div_(scale.repeat(4)[:, None])
    ids, step = prompt(200), prompt(1, seed=4)
    errors = {}
    with torch.no_grad(), backend("reference"):
        exact = model(torch.cat([ids, step], 1)).logits[:, -1]
        with enabled(model):
            for balance in ("auto", None):
                cache = OscarCache(model.config, format="k4v4", balance=balance)
                model(ids, past_key_values=cache)
                logits = model(step, past_key_values=cache).logits[:, -1]
                errors[balance] = (logits - exact).abs().mean()
    assert errors["auto"] < 0.5 * errors[None]


def test_public_names() -> None:
    for name in ("Balance", "OscarCache", "calibrate", "disable", "enable"):
        assert name in oscar_kv.__all__
