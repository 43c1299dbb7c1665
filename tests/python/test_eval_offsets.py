# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Constant offsets in K and V: where they are put, and that those of V change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny
from oscar_kv.cli import eval_kl
from oscar_kv.cli.app import app
from oscar_kv.cli.models import LoadedModel
from oscar_kv.eval.codec import LayerInput
from oscar_kv.eval.formats import make_format
from oscar_kv.eval.kl import evaluate
from oscar_kv.eval.simulate import decode, prefill
from oscar_kv.eval.stress import pair_index, parse_offset, with_offsets
from test_eval_kl import Identity, Letters, Spy, document
from torch import Tensor
from typer.testing import CliRunner


def seen(model: Any) -> LayerInput:
    """The first packed layer of a document."""
    spy = Spy()
    decode(model, prefill(model, prompt(60), 40), spy)
    return spy.layers[0]


def biased(family: str) -> Any:
    """A model with biases that are not zero, where it has any."""
    model = tiny(family)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    return model


def moved(before: Tensor, after: Tensor) -> dict[int, list[float]]:
    """channel -> constant of each head, of the channels in which K or V moved; [heads, t, d]."""
    change = after - before
    mean = change.mean(1)
    torch.testing.assert_close(change, mean[:, None].expand_as(change), rtol=1e-3, atol=1e-3)
    channels = (mean.abs().amax(0) > 1e-2).nonzero().flatten().tolist()
    return {channel: mean[:, channel].tolist() for channel in channels}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_offsets_of_k_stand_in_their_pairs(family: str) -> None:
    """In front of RoPE, in both channels of a pair, of either sign; with k_norm behind that."""
    model = biased(family)
    # The first layer only: what comes to the others has changed.
    model.model.layers = model.model.layers[-1:]
    model.model.layers[0].self_attn.layer_idx = 0
    model.config.num_hidden_layers = 1
    model.config.layer_types = ["full_attention"]
    head_dim = model.model.layers[0].self_attn.head_dim
    plain, offset = seen(model), seen(with_offsets(model, 30.0))
    assert plain.k_pre_rope is not None and offset.k_pre_rope is not None
    found = moved(plain.k_pre_rope, offset.k_pre_rope)
    pairs = [0, head_dim // 4, head_dim // 2 - 1]
    assert list(found) == [*pairs, *(pair + head_dim // 2 for pair in pairs)]
    values = torch.tensor(list(found.values()))
    torch.testing.assert_close(values.abs(), torch.full_like(values, 30.0))
    assert float(values.sign().std()) > 0
    torch.testing.assert_close(plain.v, offset.v)
    again = seen(with_offsets(model, 30.0))
    other = seen(with_offsets(model, 30.0, seed=1))
    assert torch.equal(again.k, offset.k) and not torch.allclose(other.k, offset.k, atol=1.0)
    one = seen(with_offsets(model, 30.0, pairs=["slow"]))
    assert one.k_pre_rope is not None
    half = head_dim // 2
    assert list(moved(plain.k_pre_rope, one.k_pre_rope)) == [half - 1, 2 * half - 1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
def test_offsets_of_v_change_nothing(family: str) -> None:
    model, ids = biased(family), prompt(100)
    hard = with_offsets(model, 0.0, value_offset=300.0)
    torch.testing.assert_close(hard(ids).logits, model(ids).logits, rtol=1e-2, atol=1e-2)
    plain, offset = seen(model), seen(hard)
    found = torch.tensor(list(moved(plain.v, offset.v).values()))
    torch.testing.assert_close(found.abs(), torch.full_like(found, 300.0), rtol=1e-3, atol=0)
    assert len(found) == 6
    torch.testing.assert_close(plain.k, offset.k, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_offsets_of_k_change_the_model_and_it_is_the_reference() -> None:
    model, ids = tiny("llama"), prompt(100)
    hard = with_offsets(model, 30.0)
    assert not torch.allclose(hard(ids).logits, model(ids).logits, atol=0.1)
    before = [value.clone() for value in model.parameters()]
    with_offsets(model, 30.0, value_offset=3.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.model.layers[0].self_attn.k_proj.bias is None
    exact, int8 = evaluate(hard, [document(200)], [Identity(), make_format("int8")], 100)
    assert exact.kl < 1e-5 < int8.kl


def test_models_that_cannot_be_offset_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="projections of their own"):
        with_offsets(tiny("phi3"), 3.0)
    with pytest.raises(NotImplementedError, match="do not sum to 1"):
        with_offsets(tiny("gpt_oss"), 0.0, value_offset=300.0)
    part = tiny("llama")
    part.config.rope_parameters = {**part.config.rope_parameters, "partial_rotary_factor": 0.5}
    with pytest.raises(NotImplementedError, match=r"RoPE turns 0\.5"):
        with_offsets(part, 3.0)
    model = tiny("llama")
    for arguments, word in (
        ({"offset": float("inf")}, "offset is inf"),
        ({"offset": 0.0, "value_offset": float("nan")}, "value_offset is nan"),
        ({"offset": 3.0, "pairs": ["x"]}, "pair is 'x', must be one of slow, middle, fast"),
        ({"offset": 3.0, "pairs": [32]}, "pair is 32, must be 0 to 31"),
    ):
        with pytest.raises(ValueError, match=word):
            with_offsets(model, **arguments)


def test_names_of_pairs() -> None:
    assert [pair_index(pair, 128) for pair in ("slow", "middle", "fast", 5, "7")] == [
        63, 32, 0, 5, 7,
    ]  # fmt: skip
    assert parse_offset("300") == (300.0, ("slow", "middle", "fast"))
    assert parse_offset("-2.5,pairs=slow,7") == (-2.5, ("slow", "7"))
    for text in ("", "x", "300,slow", "300,pairs=", "300,pairs=slow,", "300,pairs=quick"):
        with pytest.raises(ValueError, match="offset is "):
            parse_offset(text)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel("tiny", tiny("llama"), Letters())
    monkeypatch.setattr(eval_kl, "load_model", lambda *_: loaded)
    text = tmp_path / "a.txt"
    text.write_text("All that is gold does not glitter. " * 20, encoding="utf-8")

    def run(*more: object) -> Any:
        loaded.model = tiny("llama")
        options = ["--text", text, "--formats", "int4", "--tokens", 200, "--json", "-", *more]
        return CliRunner().invoke(app, ["eval", "kl", *map(str, options)])

    plain = json.loads(run().stdout)
    hard = json.loads(run("--offset", "20,pairs=slow", "--value-offset", 20).stdout)
    assert plain["settings"]["stress"] == "none"
    stress = "offset 20 on slow, value offset 20 on slow"
    assert hard["settings"]["stress"] == hard["rows"][0]["stress"] == stress
    assert hard["rows"][0]["kl"] > plain["rows"][0]["kl"]
    result = run("--offset", "20,pairs=quick")
    assert result.exit_code == 2 and "offset is '20,pairs=quick'" in result.output
