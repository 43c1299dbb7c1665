# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar tni` on prompts with images and sounds: which tokens are of which kind."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from audio_models import qwen2_audio
from catalogue import MEDIA, each
from family import Family
from oscar_kv.cli.app import app
from oscar_kv.tni import label_tokens, measure, modalities, token_kinds
from processors import picture, tokenizer, tone
from typer.testing import CliRunner, Result
from vision_models import llava


def oscar(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["tni", *(str(argument) for argument in arguments)])


@each(MEDIA)
def test_spans_of_every_family(family: Family) -> None:
    model, inputs = family.built.model, family.built.cases["long"]()
    ids = inputs.pop("input_ids")
    kinds = token_kinds(model.config, ids[0].tolist())
    assert set(kinds) == {"text", "audio" if family.media == "sound" else "image"}
    tokens = label_tokens(tokenizer(), ids[0].tolist(), kinds)
    measured = measure(model, ids, tokens, **inputs)
    rows = {one.kind: one for one in modalities(measured)}
    whole = kinds[: len(kinds) // 32 * 32]
    assert {kind: one.tokens for kind, one in rows.items()} == {
        kind: whole.count(kind) for kind in rows
    }
    assert all(0 < one.errors["all"] < 1 and one.norm > 0 for one in rows.values())


def saved(made: tuple[Any, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    for part in made:
        part.save_pretrained(folder)
    return folder


def test_command_with_images(tmp_path: Path) -> None:
    folder, text = saved(llava(), tmp_path / "model"), tmp_path / "text.txt"
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for number, file in enumerate(files):
        picture(number).save(file)
    text.write_text("What do you see? " * 10, encoding="utf-8")
    images = [part for file in files for part in ("--image", file)]
    outputs = ("--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    result = oscar("--model", folder, "--text", text, *images, *outputs)
    assert result.exit_code == 0, result.output
    assert "kinds of tokens" in result.stdout
    kinds = {row["kind"]: row for row in json.loads((tmp_path / "a.json").read_text())["kinds"]}
    assert kinds["image"]["tokens"] == 2 * 16
    assert "in mixed groups" in (tmp_path / "a.html").read_text(encoding="utf-8")
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"no sound")
    for arguments, message in (
        (("--sound", sound), "takes no sounds"),
        (("--image", text), "not an image"),
        (("--image", tmp_path / "none.png"), "none.png"),
    ):
        result = oscar("--model", folder, "--text", text, *arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
    result = oscar("--text", text, "--image", files[0])
    assert result.exit_code == 2 and "--model is needed" in result.stderr


def test_command_with_sounds(tmp_path: Path) -> None:
    folder, text = saved(qwen2_audio(), tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("What do you hear? " * 4, encoding="utf-8")
    sound = tmp_path / "a.wav"
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        both = (tone(1.0) * 32767).astype("<i2").repeat(2)
        file.writeframes(both.tobytes())
    result = oscar("--model", folder, "--text", text, "--sound", sound, "--json", tmp_path / "j")
    assert result.exit_code == 0, result.output
    kinds = {row["kind"]: row for row in json.loads((tmp_path / "j").read_text())["kinds"]}
    assert kinds["audio"]["tokens"] == 25  # a second in steps of 40 ms
    sound.write_bytes(b"no sound")
    result = oscar("--model", folder, "--text", text, "--sound", sound)
    assert result.exit_code == 2 and "is not a WAV file" in result.stderr, result.output


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_broken_folder(tmp_path: Path, missing: str) -> None:
    folder, text, image = saved(llava(), tmp_path / "m"), tmp_path / "t.txt", tmp_path / "a.png"
    text.write_text("words " * 20, encoding="utf-8")
    picture(1).save(image)
    (folder / missing).unlink()
    result = oscar("--model", folder, "--text", text, "--image", image)
    assert result.exit_code == 2 and "--model:" in result.stderr, result.output
