# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The steps before quantisation: against the packed cache and against hand arithmetic."""

from __future__ import annotations

import pytest
import torch
from models import backend
from oscar_kv import PagedCache
from oscar_kv.calibration import Calibration
from oscar_kv.tni.quantize import COMBINATIONS, Steps, format_bits, read_packed, transform

ALL = Steps(balance=True, rotation=True, scaling=True, center=True)
NONE = Steps(balance=False, rotation=False, scaling=False)
SCALING = Steps(balance=False, rotation=False, scaling=True)
BF16 = 2**-8  # of a K scale: its unit is stored in bf16
PLAIN = Calibration()


def rows(tokens: int, kv_heads: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    """Random rows whose norms differ by up to 64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(kv_heads, tokens, head_dim, generator=generator)
    return x * torch.rand(kv_heads, tokens, 1, generator=generator).mul(6).exp2()


def test_combinations() -> None:
    names = [steps.name for steps in COMBINATIONS]
    assert names[0] == "none" and names[-1] == "all"
    assert len(set(names)) == 9 and "rotation + scaling" in names
    assert names[-2] == "balance + rotation + scaling"


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("format", ["k2v2", "k4v2", "k4v4"])
@pytest.mark.parametrize("constant", [0.0, 20.0])
def test_all_steps_read_as_the_packed_cache(format: str, head_dim: int, constant: float) -> None:
    k, v = rows(96, 2, head_dim), rows(96, 2, head_dim, seed=1) + 0.3
    generator = torch.Generator().manual_seed(2)
    balance = 0.5 + torch.rand(2, head_dim, generator=generator)
    center = constant * torch.randn(2, head_dim, generator=generator)
    k += center[:, None]
    calibration = Calibration(balance=balance, center=center if constant else None)
    with backend("reference"):
        options = {"format": format, "window": 0, "sinks": 0, "calibration": calibration}
        cache = PagedCache(1, 2, head_dim, torch.float32, **options)
        cache.append(k.transpose(0, 1), v.transpose(0, 1))
        packed = cache.dequantize()
    read = read_packed(k, v, ALL, calibration, format)
    for ours, theirs, exact in zip(read, packed, (k, v), strict=True):
        size = exact.norm(dim=-1, keepdim=True)
        same = (ours - theirs[0]).abs() < 1e-5 * size
        # A value may lie within a rounding error of the edge between two codes.
        assert same.float().mean() > 0.999
        assert (ours - exact).norm() > 0.01 * exact.norm()


def test_without_steps_by_hand() -> None:
    """+-1 in every channel: range 2, mid 0, step 0.88 * 2 / 3, ends at +-0.88."""
    sign = torch.ones(1, 32, 64)
    sign[:, ::2] = -1
    read, _ = read_packed(sign, sign, NONE, PLAIN, "k2v2")
    torch.testing.assert_close(read, 0.88 * sign, rtol=BF16, atol=0)


def test_a_small_token_is_lost_without_token_scaling() -> None:
    """0.1 falls to the inner level 0.88 / 3 where its group reaches from -1 to 1."""
    k = torch.ones(1, 32, 64)
    k[:, ::2] = -1
    k[:, 5] *= 0.1
    read, _ = read_packed(k, k, NONE, PLAIN, "k2v2")
    torch.testing.assert_close(read[0, 5], torch.full((64,), 0.88 / 3), rtol=BF16, atol=0)
    read, _ = read_packed(k, k, SCALING, PLAIN, "k2v2")
    norm = 2 ** (-27 / 8)  # of 0.1, in 1/8 octaves: 3.6 % less, so z is a bit over 1
    z = 0.1 / norm
    expected = norm * (0.5 * (z - 1) + 0.44 * (z + 1))
    torch.testing.assert_close(read[0, 5], torch.full((64,), expected), rtol=BF16, atol=0)


def test_balance_follows_the_scale_of_channels() -> None:
    k, v = rows(32, 2, 64), rows(32, 2, 64, seed=1)
    scale = torch.ones(2, 64)
    scale[:, 7] = 8.0
    given = Calibration(balance=scale)
    plain, _ = read_packed(k, v, ALL, PLAIN, "k2v2")
    scaled, _ = read_packed(k * scale[:, None], v, ALL, given, "k2v2")
    assert torch.equal(scaled, plain * scale[:, None])
    unbalanced, _ = read_packed(k * scale[:, None], v, Steps(False, True, True), given, "k2v2")
    assert not torch.allclose(unbalanced, scaled, rtol=0.1)


def test_center_is_taken_off_and_added_again() -> None:
    k, v = rows(32, 2, 64), rows(32, 2, 64, seed=1)
    offset = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    given, moved = Calibration(center=offset), k + offset[:, None]
    plain, _ = read_packed(k, v, ALL, PLAIN, "k4v4")
    centered, _ = read_packed(moved, v, ALL, given, "k4v4")
    close = (centered - offset[:, None] - plain).abs() < 1e-4
    assert close.float().mean() > 0.999  # the sum may have rounded a value over the edge of a code
    torch.testing.assert_close(transform(moved, ALL, given), transform(k, ALL, PLAIN))
    without = Steps(True, True, True)
    assert torch.equal(transform(moved, without, given), transform(moved, without, PLAIN))


def test_rotation_is_orthogonal_and_scaling_unit() -> None:
    k = rows(32, 2, 96)
    rotated = transform(k, Steps(False, True, False), PLAIN)
    torch.testing.assert_close(rotated.norm(dim=-1), k.norm(dim=-1))
    assert not torch.allclose(rotated, k)
    unit = transform(k, Steps(False, True, True), PLAIN)
    torch.testing.assert_close(unit.square().mean(-1), torch.ones(2, 32))
    assert torch.equal(transform(k, NONE, PLAIN), k)


def test_refuses() -> None:
    x = torch.ones(1, 33, 64)
    with pytest.raises(ValueError, match="tokens is 33, must be a multiple of 32"):
        read_packed(x, x, ALL, PLAIN, "k2v2")
    with pytest.raises(ValueError, match="format is 'k3v3', must be one of"):
        format_bits("k3v3")
