# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Documents that the model continues itself: drawn from its exact predictions, scored as any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import generate, prompt, tiny
from oscar_kv.cli import eval_kl
from oscar_kv.cli.app import app
from oscar_kv.cli.models import LoadedModel
from oscar_kv.eval import generation
from oscar_kv.eval.formats import make_format
from oscar_kv.eval.generation import continue_documents, sample
from oscar_kv.eval.kl import evaluate
from test_eval_kl import Identity, Letters, document
from typer.testing import CliRunner


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_without_temperature_it_is_greedy_generation(family: str) -> None:
    model, ids = tiny(family), prompt(50)
    expected = generate(model, ids, new=20).sequences[:, 50:]
    assert torch.equal(sample(model, ids, 20, temperature=0), expected)


@torch.no_grad()
def test_tokens_are_drawn_by_their_probability() -> None:
    """Numbers that fill 0..1 evenly give each token as often as its probability says."""
    model, ids = tiny("llama"), prompt(30)
    logits = model(ids).logits[0, -1].double()
    numbers = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = torch.stack([generation._draw(logits, 0.7, number) for number in numbers])
    found = drawn.bincount(minlength=len(logits)) / 4000
    torch.testing.assert_close(found.double(), (logits / 0.7).softmax(0), rtol=0, atol=5e-4)
    logits[5] = -torch.inf
    one = torch.tensor(1 - 1e-16, dtype=torch.float64)
    edges = (torch.zeros((), dtype=torch.float64), one)
    assert all(0 <= int(generation._draw(logits, 1.0, edge)) < len(logits) for edge in edges)


def test_a_seed_decides() -> None:
    model, documents = tiny("qwen2"), [document(60, "a"), document(60, "b")]
    first, second, other = (
        continue_documents(model, documents, 40, 25, seed=seed) for seed in (1, 1, 2)
    )
    for one, same, different, source in zip(first, second, other, documents, strict=True):
        assert one.ids.shape == (1, 65) and one.name == source.name
        assert torch.equal(one.ids[:, :40], source.ids[:, :40])
        assert torch.equal(one.ids, same.ids) and not torch.equal(one.ids, different.ids)
    # The same prompt, but numbers of its own.
    assert not torch.equal(first[0].ids, first[1].ids)


def test_a_text_does_not_end() -> None:
    model, ids = tiny("llama"), prompt(30)
    first = int(sample(model, ids, 1, temperature=0))
    model.generation_config.eos_token_id = [first]
    assert int(sample(model, ids, 1, temperature=0)) != first
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = first
    assert int(sample(model, ids, 1, temperature=0)) != first


def test_generated_documents_are_scored_like_any_other() -> None:
    model = tiny("llama")
    documents = continue_documents(model, [document(100)], 80, 120)
    exact, int2 = evaluate(model, documents, [Identity(), make_format("int2")], 80)
    assert exact.documents[0].kl.shape == (120,)
    assert exact.kl < 1e-6 < 1e-3 < int2.kl


def test_bad_input_is_named() -> None:
    model = tiny("llama")
    for arguments, word in (
        ((prompt(8), 4, -1.0), "temperature is -1.0"),
        ((prompt(8), 4, float("nan")), "temperature is nan"),
        ((prompt(8), 0), "count is 0"),
        ((prompt(8, batch=2), 4), "ids has shape"),
    ):
        with pytest.raises(ValueError, match=word):
            sample(model, *arguments)
    with pytest.raises(ValueError, match="random has 30 tokens, prompt is 31"):
        continue_documents(model, [document(30)], 31, 4)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel("tiny", tiny("llama"), Letters())
    monkeypatch.setattr(eval_kl, "load_model", lambda *_: loaded)
    text = tmp_path / "a.txt"
    text.write_text("All that is gold does not glitter. " * 4, encoding="utf-8")

    def run(*more: object) -> Any:
        options = ["--text", text, "--formats", "int4", "--tokens", 200, *more]
        return CliRunner().invoke(app, ["eval", "kl", *map(str, options)])

    # The text has 140 tokens: enough for the prompt, as the rest is drawn.
    assert run().exit_code == 2
    found = [
        json.loads(run("--generate", 64, "--seed", seed, "--json", "-").stdout)
        for seed in (5, 5, 6)
    ]
    settings, (row,) = found[0]["settings"], found[0]["rows"]
    assert (settings["tokens"], settings["prompt"], settings["generate"]) == (164, 100, 64)
    assert (settings["temperature"], settings["seed"]) == (1.0, 5)
    assert settings["along"] == row["along"] == "generation"
    kl = [one["rows"][0]["kl"] for one in found]
    assert kl[0] == kl[1] != kl[2]
    result = run("--generate", 64, "--temperature", 0)
    assert "164 tokens, 100 prefilled exactly, along the model" in " ".join(result.stdout.split())
