# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The constant part of keys, where it is known by hand, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import prompt, tiny
from oscar_kv import calibrate
from oscar_kv.calibration import CENTER_RATIO, Calibration, key_center
from oscar_kv.cli.tni import _constant_table
from oscar_kv.rotate import channel_signs, hadamard
from oscar_kv.tni import (
    LayerTensors,
    Measurement,
    Settings,
    Token,
    as_dict,
    constants,
    findings,
    measure,
    measure_layer,
    save_html,
)
from oscar_kv.tni.measure import measured_calibration
from oscar_kv.tni.quantize import COMBINATIONS
from torch import Tensor

TOKENS, HEAD_DIM = 128, 64
WITHOUT = [steps.name for steps in COMBINATIONS].index("balance + rotation + scaling")


def alternating(constants: list[float]) -> Tensor:
    """[heads, tokens, channels] that rotate to constant + 1 and constant - 1, each half of the
    tokens of a channel and half of the channels of a token: all of one norm."""
    sign = 1.0 - 2.0 * ((torch.arange(TOKENS)[:, None] + torch.arange(HEAD_DIM)) % 2)
    y = torch.tensor(constants)[:, None, None] + sign
    return hadamard(y) * channel_signs(HEAD_DIM)


def random_keys(constants: list[float], seed: int = 0) -> Tensor:
    """Normal keys, and a constant so many times as long as their rms in each head."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(len(constants), 1, HEAD_DIM, generator=generator)
    mean *= HEAD_DIM**0.5 * torch.tensor(constants)[:, None, None] / mean.norm(dim=-1, keepdim=True)
    return mean + torch.randn(len(constants), TOKENS, HEAD_DIM, generator=generator)


def layer_tensors(k: Tensor) -> LayerTensors:
    generator = torch.Generator().manual_seed(1)
    q, v = (torch.randn(len(k) * n, TOKENS, HEAD_DIM, generator=generator) for n in (2, 1))
    return LayerTensors(q, k, v)


def measurement(k: Tensor) -> Measurement:
    layers = [measure_layer(layer, layer_tensors(k), Settings()) for layer in (2, 5)]
    return Measurement("synthetic", Settings(), [Token("x")] * TOKENS, layers)


def test_ratio_and_mid_step_by_hand() -> None:
    """Every mid is the constant A, every range 2: the step over the range is A / 31 / 2."""
    k = alternating([8.0, 3.0])
    center = key_center([k.transpose(0, 1)])
    found = measure_layer(0, layer_tensors(k), Settings(), Calibration(center=center))
    torch.testing.assert_close(found.constant, torch.tensor([8.0, 3.0]))
    assert found.centered().tolist() == [True, False]
    before, after = found.mid_steps
    torch.testing.assert_close(before, torch.tensor([8 / 62, 3 / 62]))
    torch.testing.assert_close(after, torch.tensor([0.0, 3 / 62]), rtol=1e-4, atol=1e-6)


def test_the_largest_mid_over_the_median_range() -> None:
    """Channels 0 and 1 lie around 31 and are 10 times as wide as all others, which lie around 0."""
    y = hadamard(alternating([0.0]) * channel_signs(HEAD_DIM))
    y[..., :2] = 31 + 10 * y[..., :2]  # of opposite sign: norms stay equal
    k = hadamard(y) * channel_signs(HEAD_DIM)
    before, _ = measure_layer(0, layer_tensors(k), Settings(), Calibration()).mid_steps
    torch.testing.assert_close(before, torch.tensor([31 / 31 / 2]))


def test_center_mends_what_the_constant_spoils() -> None:
    found = measurement(random_keys([30.0, 1.0]))
    worst, other = [row for row in constants(found) if row.layer == 2]
    assert (worst.head, worst.centered, other.centered) == (0, True, False)
    assert worst.ratio == pytest.approx(30.0, rel=0.1)
    assert worst.mid_step[0] > 0.5 > 0.05 > worst.mid_step[1]
    assert worst.score_error[0] > 1.2 * worst.score_error[1]
    assert other.mid_step[0] == other.mid_step[1] and other.score_error[0] == other.score_error[1]


def test_without_a_center_nothing_changes() -> None:
    found = measurement(random_keys([CENTER_RATIO - 1.0, 0.0]))
    for layer in found.layers:
        assert layer.calibration.center is None and not bool(layer.centered().any())
        assert torch.equal(layer.mid_steps[0], layer.mid_steps[1])
        assert torch.equal(layer.errors[WITHOUT], layer.errors[-1])
    text = " ".join(findings(found))
    assert "No head has a center: the constant part of keys is at most 4." in text


def test_a_text_that_says_little_gives_no_center() -> None:
    given = layer_tensors(random_keys([30.0, 1.0]))
    given.v = given.v[:, :1].expand(-1, TOKENS, -1)
    found = measure_layer(0, given, Settings())
    assert found.calibration.balance is None and not bool(found.centered().any())
    assert found.constant[0] > CENTER_RATIO
    # Nor does one that said little to the layers before.
    given = layer_tensors(random_keys([30.0, 1.0]))
    assert measured_calibration(given, 0.0) == (Calibration(), 0.0)
    shrunk, weight = measured_calibration(given, 0.5)
    whole, all_of_it = measured_calibration(given)
    assert (weight, all_of_it) == (0.5, 1.0) and shrunk.center is None
    assert shrunk.balance is not None and whole.balance is not None
    torch.testing.assert_close(shrunk.balance, whole.balance.sqrt())


def test_keys_that_do_not_vary_stay_finite() -> None:
    same = torch.ones(2, TOKENS, HEAD_DIM)
    same[1] = 0
    found = measure_layer(0, layer_tensors(same), Settings(), Calibration())
    assert found.constant.tolist() == [pytest.approx(1e8), 0]
    assert found.mid_steps[0].tolist() == [pytest.approx(1e8), 0]


def test_what_is_reported(tmp_path: Path) -> None:
    found = measurement(random_keys([30.0, 1.0]))
    text = " ".join(findings(found))
    assert "Keys of 2 of 4 heads are mostly a constant (largest: 3" in text
    assert "coarse as packed" not in text
    rows = json.loads(json.dumps(as_dict(found)))["constants"]
    assert len(rows) == 4 and rows[0]["centered"] and rows[0]["mid_step"][0] > 0.5
    table = _constant_table(found)
    assert table.row_count == 4 and list(table.columns[3].cells) == ["yes", "yes", "no", "no"]
    file = tmp_path / "report.html"
    save_html(found, file)
    assert "<th>|c| / rest</th>" in file.read_text(encoding="utf-8")


def test_coarse_mids_that_stay_are_named() -> None:
    k = random_keys([30.0, 1.0])
    layer = measure_layer(4, layer_tensors(k), Settings(), Calibration())
    text = " ".join(findings(Measurement("m", Settings(), [Token("x")] * TOKENS, [layer])))
    assert "In 1 of 2 heads mids are coarse as packed" in text and "layer 4, head 0)" in text


def test_centers_of_a_model_and_of_a_file() -> None:
    """Biases of the key projection make a constant; the file's center is used as it is."""
    model, ids = tiny("qwen2"), prompt(64)
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data
        bias.zero_()[:HEAD_DIM][HEAD_DIM // 2 - 1] = 500.0  # the slowest pair of RoPE
    labels = [Token("")] * 64
    found = measure(model, ids, labels)
    assert all(layer.centered().tolist() == [True, False] for layer in found.layers)
    balance = calibrate(model, ids)
    balance.centers[0] = 0.5 * balance.centers[0]
    given = measure(model, ids, labels, balance=balance)
    assert given.layers[0].calibration.center is not None
    torch.testing.assert_close(given.layers[0].calibration.center, balance.centers[0])
    torch.testing.assert_close(given.layers[1].mid_steps, found.layers[1].mid_steps)
    assert given.layers[0].mid_steps[1, 0] > 5 * found.layers[0].mid_steps[1, 0]
