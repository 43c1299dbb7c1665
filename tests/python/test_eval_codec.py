# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The codec contract, our format's twin, and the attention that reads through masks."""

from __future__ import annotations

import pytest
import torch
from oscar_kv import PagedCache, _core
from oscar_kv.calibration import Calibration
from oscar_kv.eval.codec import (
    Codec,
    LayerCodes,
    LayerInput,
    bits_resident,
    sliding_packed,
)
from oscar_kv.eval.formats import ALL, equal_window, make_format, split_formats
from oscar_kv.eval.simulate import PackedFormat, attend
from oscar_kv.eval.twin import Twin
from oscar_kv.rotate import channel_signs, hadamard
from torch import Tensor


def layer_input(
    tokens: int = 320, prompt: int = 96, head_dim: int = 64, kv_heads: int = 2
) -> LayerInput:
    """Random K with a few large tokens and channels; RoPE is the identity."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    k = normal(kv_heads, tokens, head_dim) * normal(tokens, 1).exp()
    k = k * (0.5 * normal(kv_heads, 1, head_dim)).exp() + normal(kv_heads, 1, head_dim)
    return LayerInput(
        layer=0,
        prompt=prompt,
        q=normal(2 * kv_heads, tokens, head_dim),
        k=k,
        v=3 * normal(kv_heads, tokens, head_dim),
        k_pre_rope=k,
        hidden=normal(tokens, 48),
        cos=torch.ones(tokens, head_dim),
        sin=torch.zeros(tokens, head_dim),
    )


def cut(layer: LayerInput, tokens: int) -> LayerInput:
    """The same layer when only `tokens` tokens have come."""
    names = ("q", "k", "v", "k_pre_rope")
    heads = {name: getattr(layer, name)[:, :tokens] for name in names}
    rows = {name: getattr(layer, name)[:tokens] for name in ("hidden", "cos", "sin")}
    return LayerInput(layer=layer.layer, prompt=layer.prompt, **heads, **rows)


@pytest.mark.parametrize(("window", "sinks", "group"), [(32, 4, 32), (0, 0, 1), (5, 3, 16)])
def test_sliding_mask(window: int, sinks: int, group: int) -> None:
    found = sliding_packed(40, 100, window, sinks, group)
    for row, position in enumerate(range(40, 100)):
        complete = max(0, position + 1 - window) // group * group
        for token in range(100):
            assert bool(found[row, token]) == (sinks <= token < complete)


class Half(Codec):
    """Packs the even tokens of K and no V, at 2 and 3 bits."""

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        return 2.0, 3.0

    def encode(self, layer: LayerInput) -> LayerCodes:
        even = (torch.arange(layer.tokens) % 2 == 0)[None, None]
        return LayerCodes(layer.k, layer.v, even, torch.zeros_like(even), extra_bits=256.0)


def test_bits_of_masks() -> None:
    layer = layer_input(tokens=8, prompt=6, head_dim=4, kv_heads=2)
    # Queries 6 and 7 see 7 and 8 tokens, 4 of them packed in K.
    k = sum(s * 2 + (1 - s) * 16 for s in (4 / 7, 4 / 8)) / 2
    expected = (k + 16) / 2 + 256 / (2 * 2 * 8 * 4)
    assert bits_resident(Half(), Half().encode(layer), layer) == pytest.approx(expected)


def test_attention_reads_each_copy_where_the_masks_say() -> None:
    layer = layer_input(tokens=330, prompt=30, head_dim=16)
    generator = torch.Generator().manual_seed(3)

    def mask(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) > 0.4

    k, v = layer.k + 0.3, layer.v - 0.5
    for k_mask, v_mask in (
        (mask(2, 300, 330), mask(2, 300, 330)),
        (mask(1, 300, 330), mask(300, 330)),
        (torch.zeros(1, 1, 330, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool)),
    ):
        found = attend(layer, LayerCodes(k, v, k_mask, v_mask), 0.25)
        k_all, v_all = k_mask.expand(2, 300, 330), v_mask.expand(2, 300, 330)
        for head in range(4):
            for row in (0, 1, 255, 256, 299):
                end = 31 + row
                pick_k = k_all[head // 2, row, :end, None]
                pick_v = v_all[head // 2, row, :end, None]
                keys = torch.where(pick_k, k[head // 2, :end], layer.k[head // 2, :end])
                values = torch.where(pick_v, v[head // 2, :end], layer.v[head // 2, :end])
                weights = (0.25 * keys @ layer.q[head, 30 + row]).softmax(0)
                torch.testing.assert_close(found[head, row], weights @ values)


def test_hadamard_of_odd_sizes_is_its_own_inverse() -> None:
    for head_dim in (64, 80, 96, 128, 256):
        x = torch.randn(3, head_dim)
        torch.testing.assert_close(hadamard(hadamard(x)), x)
        block = head_dim & -head_dim
        one = hadamard(torch.eye(head_dim))[0]
        torch.testing.assert_close(one[:block], torch.full((block,), block**-0.5))
    assert set(channel_signs(128).tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("format", ["k2v2", "k4v2", "k4v4"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_twin_reads_as_the_packed_kernels(format: str, head_dim: int, offset: float) -> None:
    layer = layer_input(head_dim=head_dim)
    layer.k[0, :, :3] += offset  # the first head gets a center then
    twin = make_format(f"{format}-twin")
    assert isinstance(twin, Twin)
    balance, weights, center = twin.measure(layer)
    assert float(balance.std()) > 0.1
    assert center.any(-1).tolist() == [offset > 0, False]
    calibration = Calibration(balance, center, weights)
    cache = PagedCache(
        1, 2, head_dim, torch.float32, format=format, window=0, sinks=0, calibration=calibration
    )
    cache.append(layer.k.transpose(0, 1), layer.v.transpose(0, 1))
    codes = twin.encode(layer)
    coded = (layer.k - center[:, None], layer.v)
    sides = zip((codes.k, codes.v), cache.dequantize(), (layer.k, layer.v), coded, strict=True)
    for found, packed, exact, rest in sides:
        # A value on the edge of a step may fall on either side; the error is then a whole step, and
        # the feedback carries it on.
        wrong = (found - packed[0]).abs() > 1e-3 * rest.abs().max()
        assert float(wrong.float().mean()) < 3e-4
        assert 0.01 < float((found - exact).norm() / rest.norm()) < 0.7
    k_bits, v_bits = twin.bits(head_dim, 2)
    assert (k_bits + v_bits) * 32 * head_dim == pytest.approx(
        8 * _core.tile_bytes(head_dim, format)
    )


@pytest.mark.parametrize("format", ["k2v2", "k4v4"])
def test_decoding_through_the_twin_is_decoding_through_the_kernels(format: str) -> None:
    layer = layer_input()
    twin = make_format(f"{format}-twin")
    assert isinstance(twin, Twin)
    balance, weights, center = twin.measure(layer)
    calibration = Calibration(balance, center, weights)
    cache = PagedCache(1, 2, 64, torch.float32, format=format, calibration=calibration)
    q, k, v = (x.transpose(0, 1).contiguous() for x in (layer.q, layer.k, layer.v))
    cache.append(k[:96], v[:96])
    real, _ = cache.attend(q[96:], k[96:], v[96:], scale=0.125, strict=True)
    exact = LayerCodes(layer.k, layer.v, *2 * [torch.zeros(1, 1, 1, dtype=torch.bool)])
    found, reference = attend(layer, twin.encode(layer), 0.125), attend(layer, exact, 0.125)
    error = (real.transpose(0, 1) - found).norm() / (found - reference).norm()
    assert float(error) < 0.05  # int8 arithmetic of a backend, against the format's own error


@pytest.mark.parametrize(
    "change",
    ["k_bits=3", "k_share=0.7", "v_share=0.6", "group=16", "scale=linear", "scale=fp16",
     "mid_bits=4", "mid_bits=16", "reach=0", "v_group=32", "center_ratio=0.1", "norm=layer",
     "norm=none", "norm_steps=1", "norm_steps=0", "norm_blocks=2", "balance=none",
     "balance_tokens=32", "rotate=0", "feedback=none", "rounding=norm", "rounding=mean"],
)  # fmt: skip
def test_every_parameter_of_the_twin_does_something(change: str) -> None:
    layer = layer_input()
    usual, changed = make_format("twin").encode(layer), make_format(f"twin:{change}").encode(layer)
    assert not (torch.equal(usual.k, changed.k) and torch.equal(usual.v, changed.v))
    worst = max(
        float((a - b).norm() / b.norm()) for a, b in ((changed.k, layer.k), (changed.v, layer.v))
    )
    assert worst < 0.9


def test_the_twin_refuses_what_it_cannot_do() -> None:
    for change in (
        "norm=x",
        "rounding=x",
        "scale=x",
        "center=x",
        "group=5",
        "k_bits=0",
        "v_bits=9",
    ):
        name = change.partition("=")[0]
        with pytest.raises(ValueError, match=name):
            make_format(f"twin:{change}")


def every_codec() -> list[str]:
    specs = [*split_formats(ALL), "k2v2-twin", "twin:group=16,window=64"]
    specs += [spec for spec in map(equal_window, specs) if spec is not None]
    return [spec for spec in specs if not isinstance(make_format(spec), PackedFormat)]


@pytest.mark.parametrize("spec", every_codec())
def test_no_query_reads_what_does_not_exist_yet(spec: str) -> None:
    """Cutting the document after a query changes neither its mask nor the copies it reads."""
    codec = make_format(spec)
    layer = layer_input(tokens=600, prompt=300, head_dim=64, kv_heads=4)
    whole = codec.encode(layer)
    read = 0
    for tokens in (301, 387, 512, 599):
        then = codec.encode(cut(layer, tokens))
        for name in ("k", "v"):
            masks = []
            for codes, length in ((whole, 600), (then, tokens)):
                mask = getattr(codes, f"{name}_packed").expand(4, length - 300, length)
                masks.append(mask[:, tokens - 301, :tokens])
            assert torch.equal(*masks)
            assert not bool(masks[0][:, -1].any())  # its own token is at hand
            a, b = (getattr(codes, name)[:, :tokens] for codes in (whole, then))
            torch.testing.assert_close(a[masks[0]], b[masks[0]])
            read += int(masks[0].sum())
    assert read > 0
