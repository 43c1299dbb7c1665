# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Error feedback: its weights, where they come from, and what they do to packed keys."""

from __future__ import annotations

import oscar_kv
import pytest
import torch
from models import prompt, tiny
from oscar_kv.balance import Balance, calibrate
from oscar_kv.cache import PagedCache
from oscar_kv.calibration import QueryStatistics
from oscar_kv.feedback import DAMPING, feedback_factors
from oscar_kv.rotate import channel_signs, hadamard


def rotated_moment(q: torch.Tensor, balance: torch.Tensor) -> torch.Tensor:
    turned = hadamard(q * (balance * channel_signs(q.shape[-1]))[:, None])
    return torch.einsum("hti,htj->hij", turned, turned) / q.shape[1]


def queries(kv_heads: int = 2, tokens: int = 400, head_dim: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(kv_heads, head_dim, head_dim, generator=generator)
    return torch.randn(kv_heads, tokens, head_dim, generator=generator) @ mixing


def test_moment_is_the_mean_over_tokens_and_query_heads() -> None:
    q = torch.randn(70, 6, 8)
    seen = QueryStatistics()
    seen.observe(q[:50])
    seen.observe(q[50:])
    wanted = torch.zeros(2, 8, 8)
    for head in range(6):
        for token in range(70):
            wanted[head // 3] += torch.outer(q[token, head], q[token, head]) / (70 * 3)
    torch.testing.assert_close(seen.moment(2), wanted)
    torch.testing.assert_close(seen.mean_square(2), wanted.diagonal(dim1=1, dim2=2))


def test_weights_solve_the_least_squares_problem() -> None:
    """Row c: what later channels must do about an error of 1 in channel c, all free to choose."""
    q, balance = queries(), torch.linspace(0.5, 2.0, 96).view(2, 48)
    moment = torch.einsum("hti,htj->hij", q, q) / q.shape[1]
    weights = feedback_factors(moment, balance).float()
    metric = rotated_moment(q, balance).double()
    metric += DAMPING * metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(48)
    assert torch.equal(weights, weights.triu(1))
    for head in range(2):
        for c in (0, 17, 46):
            rest = metric[head, c + 1 :, c + 1 :]
            # e_rest minimises (1, e)^T M (1, e); the later channels move against it.
            best = -torch.linalg.solve(rest, metric[head, c + 1 :, c])
            torch.testing.assert_close(
                weights[head, c, c + 1 :].double(), best, rtol=2e-3, atol=2e-3
            )


def test_a_head_without_queries_gets_no_feedback() -> None:
    moment = torch.zeros(2, 32, 32)
    moment[1] = torch.eye(32) + 0.5
    weights = feedback_factors(moment, torch.ones(2, 32))
    assert not weights[0].any() and weights[1].any()


@pytest.mark.parametrize("format", ["k2v2", "k4v2"])
def test_scores_of_such_queries_err_less(format: str) -> None:
    q = queries(kv_heads=1, head_dim=64, tokens=600)
    k = torch.randn(320, 1, 64, generator=torch.Generator().manual_seed(6))
    weights = feedback_factors((q.transpose(1, 2) @ q) / q.shape[1], torch.ones(1, 64))
    errors = []
    for feedback in (None, weights):
        cache = PagedCache(1, 1, 64, torch.float32, format=format, window=0, sinks=0)
        cache.feedback = feedback
        cache.append(k, k)
        cache.exact_start = [320]
        cache.exact_from.fill_(320)
        read, values = cache.dequantize()
        errors.append(((read[0] - k.transpose(0, 1)) @ q.transpose(1, 2)).square().mean())
        if feedback is None:
            plain = values
    assert errors[1] < 0.65 * errors[0]
    assert torch.equal(values, plain), "V has no feedback"


def test_refused_values_leave_the_cache_as_it_was() -> None:
    cache = PagedCache(1, 2, 64, torch.float32)
    with pytest.raises(
        ValueError, match=r"feedback has shape \[2, 64, 32\], must be \[2, 64, 64\]"
    ):
        cache.feedback = torch.zeros(2, 64, 32)
    with pytest.raises(ValueError, match="must be finite"):
        cache.feedback = torch.full((2, 64, 64), float("nan"))
    assert cache.feedback is None


def test_measured_kept_and_saved_with_the_balance(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, ids = tiny("llama"), prompt(80)
    measured = calibrate(model, ids)
    assert measured.feedback.keys() == measured.factors.keys()
    measured.save(tmp_path / "balance.safetensors")
    loaded = Balance.load(tmp_path / "balance.safetensors")
    for layer, value in measured.feedback.items():
        assert torch.equal(loaded.feedback[layer], value)
    cache = oscar_kv.OscarCache(model.config, balance=loaded)
    oscar_kv.enable(model)
    model(ids, past_key_values=cache)
    for layer in cache.layers:
        assert torch.equal(layer.paged.feedback, measured.feedback[layer.index])
    damaged = Balance.for_config(model.config, measured.factors, {0: measured.feedback[0][:, :4]})
    damaged.save(tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=r"feedback 0: expected torch.float16"):
        Balance.load(tmp_path / "damaged.safetensors")
