# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Norms, imbalance, outliers, ranges and errors on keys where they are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import prompt, tiny
from oscar_kv import calibrate
from oscar_kv.calibration import Calibration
from oscar_kv.tni import (
    LayerTensors,
    Measurement,
    Settings,
    Token,
    find_outliers,
    label_tokens,
    measure,
    measure_layer,
    modalities,
    token_kinds,
)
from oscar_kv.tni.measure import (
    METRICS,
    STAGES,
    imbalance,
    max_over_median,
    max_over_min,
    relative_norms,
)
from oscar_kv.tni.quantize import COMBINATIONS, Steps, read_packed
from oscar_kv.tni.summary import as_dict, error, findings, frequent_texts, heads
from torch import Tensor

TOKENS, KV_HEADS, Q_HEADS, HEAD_DIM = 128, 2, 4, 64
SCALING = COMBINATIONS.index(Steps(False, True, True))


def keys(norms: Tensor, seed: int = 0) -> Tensor:
    """Random directions [kv_heads, tokens, head_dim] of the given norms [kv_heads, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*norms.shape, HEAD_DIM, generator=generator)
    return x / x.norm(dim=-1, keepdim=True) * norms[..., None]


def tensors(norms: Tensor, **options: Any) -> LayerTensors:
    q = keys(torch.full((Q_HEADS, norms.shape[1]), 12.0), seed=1)
    v = keys(torch.full(norms.shape, 4.0), seed=2)
    return LayerTensors(q, keys(norms), v, **options)


def uneven() -> Tensor:
    """Norm 8, but token 3 of both heads 0.8 and token 70 of head 1 40."""
    norms = torch.full((KV_HEADS, TOKENS), 8.0)
    norms[:, 3] = 0.8
    norms[1, 70] = 40.0
    return norms


def measurement(settings: Settings | None = None, norms: Tensor | None = None) -> Measurement:
    settings = settings or Settings()
    tokens = [Token(f"t{i % 40}", "image" if 64 <= i < 96 else "text") for i in range(TOKENS)]
    layers = [
        measure_layer(layer, tensors(uneven() if norms is None else norms), settings)
        for layer in (2, 5)
    ]
    return Measurement("synthetic", settings, tokens, layers)


def test_imbalance_by_hand() -> None:
    norms = torch.full((64,), 2.0)
    norms[40], norms[50] = 1.0, 5.0
    torch.testing.assert_close(imbalance(norms), torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(max_over_min(norms), torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(max_over_median(norms), torch.tensor([1.0, 2.5]))
    relative = relative_norms(norms)
    assert (relative[0], relative[40], relative[50]) == (1.0, 0.5, 2.5)


def test_zero_keys_stay_finite() -> None:
    norms = torch.zeros(64)
    assert torch.equal(relative_norms(norms), torch.ones(64))
    assert torch.equal(imbalance(norms), torch.zeros(2))
    norms[:32] = 3.0
    norms[0] = 0.0
    assert max_over_min(norms)[0] == pytest.approx(1e8)
    whole = measure_layer(0, tensors(norms.expand(KV_HEADS, -1)), Settings())
    for value in vars(whole).values():
        assert not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def test_norms_and_quantiles() -> None:
    found = measure_layer(0, tensors(uneven()), Settings())
    torch.testing.assert_close(found.norms, uneven())
    low, _, p25, p50, p75, _, high = found.quantiles()[1].tolist()
    assert (low, p25, p50, p75, high) == pytest.approx((0.8, 8, 8, 8, 40))


def test_outliers_by_hand() -> None:
    found = measurement()
    low, high = find_outliers(found.ratios(), [2, 5], found.tokens)
    assert [one.position for one in low] == [3]
    assert low[0].token.text == "t3" and low[0].share == 1.0
    assert low[0].ratio == pytest.approx(0.1, rel=1e-4)
    assert [one.position for one in high] == [70]
    assert high[0].token.kind == "image" and high[0].share == 0.5
    assert (high[0].head, high[0].worst) == (1, pytest.approx(5.0, rel=1e-4))
    worst = heads(found)[0]
    assert worst.head == 1 and worst.imbalance == pytest.approx((0.9 + 4.0) / 4, rel=1e-4)


def test_a_token_just_inside_is_no_outlier() -> None:
    ratios = torch.ones(1, 1, 32)
    ratios[0, 0, 4], ratios[0, 0, 9] = 0.51, 1.99
    tokens = [Token("x")] * 32
    assert find_outliers(ratios, [0], tokens) == ([], [])
    ratios[0, 0, 4], ratios[0, 0, 9] = 0.5, 2.0
    low, high = find_outliers(ratios, [0], tokens)
    assert (low[0].position, high[0].position) == (4, 9)


def test_channel_ranges_by_hand() -> None:
    """+-a in a channel of amplitude a: range 2 a, whatever the group."""
    amplitude = torch.ones(HEAD_DIM)
    amplitude[7] = 20.0
    sign = torch.randn(
        KV_HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0)
    ).sign()
    given = LayerTensors(sign.repeat(2, 1, 1), sign * amplitude, sign)
    ranges = measure_layer(0, given, Settings(), Calibration()).ranges
    expected = 2 * amplitude / amplitude.square().mean().sqrt()
    torch.testing.assert_close(ranges[0], expected.expand(KV_HEADS, -1))
    rotated = ranges[list(STAGES).index("balanced, rotated")]
    assert rotated.amax() < 2 * rotated.amin()
    # Measured balance: K's deviation over Q's rms is 20 in channel 7 (and its pair's mean with 1).
    balanced = measure_layer(0, given, Settings()).ranges[1]
    assert balanced[0, 7] / balanced[0, 0] == pytest.approx(20 / 200.5**0.25, rel=1e-2)


def test_token_scaling_saves_the_small_token() -> None:
    found = measure_layer(0, tensors(uneven()), Settings())
    without, with_scaling = found.scaling_errors[:, 0, 3].tolist()
    assert without > 1.0 > 0.4 > with_scaling
    torch.testing.assert_close(
        found.token_errors[SCALING], found.scaling_errors[1].float().mean(0), rtol=1e-2, atol=1e-3
    )
    # The 31 neighbours of a large token lose detail without it.
    neighbours = found.scaling_errors[:, 1, 71:96].float().mean(1)
    assert neighbours[0] > 1.5 * neighbours[1]


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "softcap": 5.0}, {"sink_logits": True}])
def test_score_and_output_errors_against_loops(options: dict[str, Any]) -> None:
    if "sink_logits" in options:
        options = {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    settings = Settings(window=20, sinks=3, queries=5)
    given = tensors(uneven(), **options)
    found = measure_layer(0, given, settings, Calibration())
    k, v = read_packed(given.k, given.v, COMBINATIONS[SCALING], Calibration(), "k2v2")
    scale, cap = given.scale or HEAD_DIM**-0.5, given.softcap
    squares, pairs, exact_out, read_out = 0.0, 0, [], []
    for position in torch.linspace(TOKENS // 2, TOKENS - 1, 5).round().long().tolist():
        for q_head in (2, 3):  # of KV head 1
            q = given.q[q_head, position].double()
            scores: list[list[float]] = [[], []]
            values: list[list[Tensor]] = [[], []]
            for t in range(position + 1):
                packed = t >= 3 and (t // 32 + 1) * 32 <= position + 1 - 20
                for side, (keys_, values_) in enumerate(((given.k, given.v), (k, v))):
                    read = side == 1 and packed
                    key = (keys_ if read else given.k)[1, t].double()
                    score = float(q @ key) * scale
                    score = cap * torch.tensor(score / cap).tanh().item() if cap else score
                    scores[side].append(score)
                    values[side].append((values_ if read else given.v)[1, t].double())
                squares += (scores[1][-1] - scores[0][-1]) ** 2
                pairs += packed
            extra = [] if given.sink_logits is None else [float(given.sink_logits[q_head])]
            for side, out in ((0, exact_out), (1, read_out)):
                weights = torch.tensor(scores[side] + extra).double().softmax(0)[: position + 1]
                out.append(weights @ torch.stack(values[side]))
    exact, read = torch.stack(exact_out), torch.stack(read_out)
    errors = dict(zip(METRICS, found.errors[SCALING, 1, :, 1].tolist(), strict=True))
    assert errors["score"] == pytest.approx((squares / pairs) ** 0.5, rel=1e-3)
    assert errors["output"] == pytest.approx(float((read - exact).norm() / exact.norm()), rel=1e-3)
    assert errors["output"] > 0.01


def test_what_nobody_reads_packed_has_no_error() -> None:
    found = measure_layer(0, tensors(uneven()), Settings(window=TOKENS)).errors
    metrics = dict(zip(METRICS, found[SCALING, 0], strict=True))
    assert torch.equal(metrics["score"], torch.zeros(2))
    torch.testing.assert_close(metrics["output"], torch.zeros(2), rtol=0, atol=1e-6)
    assert (metrics["k"] > 0.1).all()
    short = measure_layer(0, tensors(uneven()[:, :32]), Settings(sinks=32)).errors
    assert torch.equal(short[:, 1, :2], torch.zeros(9, 2, KV_HEADS))


def test_the_incomplete_group_is_left_out() -> None:
    whole, longer = (
        measure_layer(0, tensors(uneven()[:, :n]), Settings(), Calibration()) for n in (96, 100)
    )
    assert longer.norms.shape[1] == 96 and longer.token_errors.shape[1] == 96
    assert whole.errors.shape == longer.errors.shape


def test_kinds_and_texts() -> None:
    norms = torch.full((KV_HEADS, TOKENS), 8.0)
    norms[:, 64:96] = 24.0
    found = measurement(norms=norms)
    text, picture = modalities(found)
    assert (text.kind, text.tokens, text.norm) == ("text", 96, pytest.approx(1.0))
    assert (picture.kind, picture.tokens, picture.norm) == ("image", 32, pytest.approx(3.0))
    assert text.mixed == picture.mixed == 0  # the image fills one group
    row = as_dict(found)["kinds"][1]
    assert (row["kind"], row["norm"]) == ("image", pytest.approx(3.0))
    assert "Keys of image tokens are 3.0 times as large" in " ".join(findings(found))
    texts = {text: (count, ratio) for text, count, ratio in frequent_texts(measurement())}
    assert texts["t3"][0] == 4 and texts["t3"][1] == pytest.approx(0.1**0.25, rel=1e-3)


def test_gap_between_kinds_in_a_group() -> None:
    """Half of each group is an image with keys five times as large: words lose, scaling mends."""
    norms = torch.full((KV_HEADS, TOKENS), 8.0)
    inside = torch.arange(TOKENS) % 32 >= 16
    norms[:, inside] = 40.0
    layer = measure_layer(0, tensors(norms), Settings())
    tokens = [Token("x", "image" if one else "text") for one in inside]
    text, picture = modalities(Measurement("gap", Settings(), tokens, [layer]))
    assert text.mixed == picture.mixed == TOKENS // 2
    assert text.errors["rotation"] > 3 * picture.errors["rotation"]
    assert text.errors["rotation + scaling"] < 0.3 * text.errors["rotation"]


def test_kinds_by_placeholder() -> None:
    class Config:
        image_token_id, audio_token_index, video_token_id = 7, 9, None

    class Omni:
        thinker_config = Config()

    kinds = ["text", "image", "image", "audio"]
    assert token_kinds(Config(), [1, 7, 7, 9]) == token_kinds(Omni(), [1, 7, 7, 9]) == kinds
    assert token_kinds(object(), [7]) == ["text"]


def test_findings_name_the_tokens() -> None:
    text = " ".join(findings(measurement()))
    assert "'t3' at position 3: 0.10 of" in text
    assert "'t30' at position 70: 5.0 times" in text
    calm = " ".join(findings(measurement(norms=torch.full((KV_HEADS, TOKENS), 8.0))))
    assert "No token's norm is below 1/2" in calm and "above 2 times" in calm


def test_json_figures() -> None:
    found = measurement()
    content = as_dict(found)
    assert content["layers"] == [2, 5] and content["tokens"] == TOKENS
    row = next(r for r in content["errors"] if r["steps"] == "all" and not r["exact_sinks"])
    assert row["output"] == pytest.approx(float(error(found, "output", "all", False).mean()))
    assert content["low_norm_tokens"][0]["text"] == "t3"
    assert content["large_norm_tokens"][0]["kind"] == "image"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_keys_are_those_of_the_cache(family: str) -> None:
    model, ids = tiny(family), prompt(70)
    before = model.config._attn_implementation
    labels = [Token(str(i)) for i in ids[0].tolist()]
    found = measure(model, ids, labels, name=family)
    assert model.config._attn_implementation == before
    assert len(found.tokens) == 64
    cache = model(ids, use_cache=True).past_key_values
    full = [layer for layer in found.layers if not cache.layers[layer.layer].is_sliding]
    assert len(full) == len(found.layers) == (1 if family in ("gemma2", "gpt_oss") else 2)
    for layer in found.layers:
        expected = cache.layers[layer.layer].keys[0, :, :64].norm(dim=-1)
        torch.testing.assert_close(layer.norms, expected, rtol=1e-4, atol=1e-4)
    expected = calibrate(model, ids).of_layer(found.layers[0].layer)
    torch.testing.assert_close(found.layers[0].calibration.balance, expected.balance)


def test_options_of_the_scores_reach_the_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    from oscar_kv.tni import capture

    seen: list[LayerTensors] = []

    def spy(layer: int, given: LayerTensors, *rest: Any) -> Any:
        seen.append(given)
        return measure_layer(layer, given, *rest)

    monkeypatch.setattr(capture, "measure_layer", spy)
    ids = prompt(64)
    labels = [Token("")] * 64
    measure(tiny("gemma2"), ids, labels)
    measure(tiny("gpt_oss"), ids, labels)
    assert seen[0].softcap == 5.0 and seen[0].scale == 64**-0.5
    assert seen[1].sink_logits is not None and seen[1].softcap == 0.0


def test_refuses() -> None:
    model, ids = tiny("llama"), prompt(64)
    with pytest.raises(ValueError, match=r"must be \[1, tokens\] with at least 32"):
        measure(model, prompt(31), [Token("")] * 31)
    with pytest.raises(ValueError, match=r"must be \[1, tokens\]"):
        measure(model, prompt(64, batch=2), [Token("")] * 64)
    with pytest.raises(ValueError, match="tokens has 3 entries, input_ids 64 columns"):
        measure(model, ids, [Token("")] * 3)
    with pytest.raises(ValueError, match="sinks is 33, must be 0 to 32"):
        Settings(sinks=33)
    with pytest.raises(ValueError, match="window is -1, must be 0 or more"):
        Settings(window=-1)
    with pytest.raises(ValueError, match="20 tokens, at least 32"):
        measure_layer(0, tensors(uneven()[:, :20]), Settings())
    bad = tensors(uneven())
    bad.k[0, 5, 5] = torch.inf
    with pytest.raises(ValueError, match="layer 4: K or V is not finite"):
        measure_layer(4, bad, Settings())
    with pytest.raises(ValueError, match="kinds has 1 entries, must have one a token"):
        label_tokens(None, [1, 2], ["text"])
