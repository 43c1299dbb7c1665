# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The examples run on tiny checkpoints, an image drawn and a tone synthesised here."""

from __future__ import annotations

import re
import runpy
import sys
import wave
from pathlib import Path
from typing import Any

import oscar_kv
import pytest
import torch
from audio_models import qwen2_audio
from eval_tasks_models import save_checkpoint
from models import enabled, tiny
from processors import picture, tone
from vision_models import llava

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
REPORT = re.compile(r"(\d+) tokens in ([\d.]+) MB: ([\d.]+) bits an element")


def save(made: tuple[Any, Any], folder: Path) -> str:
    torch.manual_seed(0)
    for part in made:
        part.save_pretrained(folder)
    return str(folder)


def call(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *(str(argument) for argument in arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def report(text: str) -> tuple[int, float, float]:
    found = REPORT.search(text)
    assert found is not None, text
    return int(found[1]), float(found[2]), float(found[3])


def test_vision(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder, image = save(llava(), tmp_path / "model"), tmp_path / "image.png"
    picture(1).save(image)
    options = (folder, "--question", "What is it? " * 20, "--new-tokens", 40)
    call("vision", *options, "--image", image, monkeypatch=monkeypatch)
    tokens, size, bits = report(capsys.readouterr().out)
    # 16 tokens of an image of 28 x 28 in patches of 7, the question's bytes, 40 new ones less one
    assert tokens == 16 + 1 + 240 + 39
    assert size == pytest.approx(tokens * 2 * 2 * 2 * 64 * bits / 8e6, rel=0.02, abs=0.006)
    call("vision", *options, "--format", "k4v4", monkeypatch=monkeypatch)
    assert report(capsys.readouterr().out)[2] > bits


def test_audio(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder, sound = save(qwen2_audio(), tmp_path / "model"), tmp_path / "sound.wav"
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((tone(1.0) * 32767).astype("<i2").tobytes())
    call("audio", folder, "--sound", sound, "--new-tokens", 40, monkeypatch=monkeypatch)
    one_second = report(capsys.readouterr().out)[0]
    call("audio", folder, "--new-tokens", 40, monkeypatch=monkeypatch)
    assert report(capsys.readouterr().out)[0] - one_second == 25  # a second more of sound
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
    with pytest.raises(ValueError, match="16 bits at 8000 Hz, must have 16 bits at 16000 Hz"):
        call("audio", folder, "--sound", sound, monkeypatch=monkeypatch)


def test_pipeline(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = save_checkpoint(tmp_path / "model")
    made = []
    original = oscar_kv.OscarCache.__init__

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(oscar_kv.OscarCache, "__init__", count)
    questions = ("What is a cache?", "And a key? " * 20)
    call("pipeline", folder, *questions, "--new-tokens", 8, monkeypatch=monkeypatch)
    assert capsys.readouterr().out.count("\n> ") == 1
    lengths = [layer.paged.lengths for layer in made[-1].layers]
    padding = len(questions[1]) - len(questions[0])
    assert all(long - short == padding for short, long in lengths)


def tiny_server(folder: str) -> tuple[Any, str]:
    """A model manager of `transformers serve` as examples/serve.py changes it, and a model name."""
    from transformers.cli.serving.model_manager import ModelManager

    class Manager(ModelManager):  # type: ignore[misc]
        """Of this test alone."""

    example = runpy.run_path(str(EXAMPLES / "serve.py"))
    example["pack_models"](Manager, format="k4v2")
    return Manager(device="cpu"), f"{folder}@main"


def test_serve_enables_each_model_once(tmp_path: Path) -> None:
    manager, name = tiny_server(str(save_checkpoint(tmp_path / "model")))
    model, _ = manager.load_model_and_processor(name)
    ids = torch.arange(40)[None]
    out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert out.past_key_values.shared.format == "k4v2"
    balances = out.past_key_values.balances
    again, _ = manager.load_model_and_processor(name)
    assert again is model
    out = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    for layer, balance in out.past_key_values.balances.items():
        assert torch.equal(balance, balances[layer])
    manager.shutdown()


def test_continuous_batching_is_refused() -> None:
    model = tiny("llama")
    with enabled(model):
        with pytest.raises(NotImplementedError, match=r"16-bit cache of its own.*disable"):
            model.generate_batch([[2, 3, 4]])
        with (
            pytest.raises(NotImplementedError, match="LlamaForCausalLM"),
            model.continuous_batching_context_manager(),
        ):
            pass
    assert "init_continuous_batching" not in vars(model)
