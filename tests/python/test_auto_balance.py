# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The balance that an engine measures for itself: once for a model, whoever asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oscar_kv.auto_balance as auto_balance
import pytest
import torch
from models import VOCABULARY, tiny
from oscar_kv.auto_balance import balance_file
from oscar_kv.balance import Balance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "small-model"
    tiny("llama").save_pretrained(folder)
    words = {"[UNK]": 0, **{letter: 2 + i for i, letter in enumerate("etaoinshrdlu")}}
    assert max(words.values()) < VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(auto_balance.FOLDER, str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_a_file_is_taken_as_it_is() -> None:
    assert balance_file("some.safetensors", "no-model") == "some.safetensors"


def test_measured_in_a_process_of_its_own(checkpoint: Path, kept: Path) -> None:
    file = balance_file("auto", str(checkpoint))
    found = Balance.load(file)
    assert found.factors.keys() == {0, 1} and Path(file).parent == kept
    assert all(torch.isfinite(x).all() and (x != 1).any() for x in found.factors.values())
    found.check(tiny("llama").config)
    assert [x.suffix for x in sorted(kept.iterdir())] == [".safetensors", ".lock"]


def test_once_for_all_ranks_and_again_for_other_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []

    def fake(folder: Path, file: Path) -> None:
        measured.append(folder)
        file.write_bytes(b"")

    monkeypatch.setattr(auto_balance, "_measure", fake)
    with ThreadPoolExecutor(4) as ranks:
        files = list(ranks.map(lambda _: balance_file("auto", str(checkpoint)), range(4)))
    assert len(set(files)) == 1 and measured == [checkpoint.resolve()]
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert balance_file("auto", str(checkpoint)) not in files
    assert len(measured) == 2


def test_a_model_that_is_not_here() -> None:
    with pytest.raises(ValueError, match="'nobody/nothing' is neither a folder"):
        balance_file("auto", "nobody/nothing")


def test_what_cannot_be_measured_says_why(checkpoint: Path, kept: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"small-model failed:[\s\S]*cannot load"):
        balance_file("auto", str(checkpoint))
    assert not list(kept.glob("*.safetensors"))
