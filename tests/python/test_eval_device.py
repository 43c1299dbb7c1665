# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The laboratory keeps its tensors on one device, and says so when that device is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oscar_kv.cli.app import app
from oscar_kv.cli.common import InputError
from oscar_kv.cli.models import pick_device
from oscar_kv.eval.kl import no_tf32
from test_eval_codec import every_codec
from typer.testing import CliRunner

PARTS = ["evaluate llama", "evaluate gemma3", "generation", "stress", "modality"]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """Tracebacks by part, empty where all is well."""
    script = Path(__file__).with_name("eval_on_device.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("part", [*every_codec(), "turboquant:product=1", *PARTS])
def test_everything_stays_on_the_device_of_the_model(failures: dict[str, str], part: str) -> None:
    assert failures[part] == ""


def test_the_pretended_device_is_strict() -> None:
    code = """
import torch
from pretend_device import NAME, Pretend
with Pretend():
    x = torch.ones(3, 4, device=NAME)
    assert x.device.type == (x + 1).device.type == NAME and float(x.sum()) == 12
    x[:, 0] = 5
    assert x.cpu().sum() == 24 and x.cpu().device.type == "cpu"
    for wrong in (lambda: x + torch.arange(4), lambda: torch.ones(3, 4)[x > 2],
                  lambda: torch.rand(3, generator=torch.Generator(), device=NAME)):
        try:
            wrong()
        except RuntimeError as error:
            assert "CPU" in str(error)
        else:
            raise AssertionError("not refused")
"""
    folder = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    for value in ("gpu", "cuda:x", "meta", ""):
        with pytest.raises(InputError, match="is not cpu, cuda or cuda:N"):
            pick_device(value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"cuda: torch .* finds no CUDA device"):
        pick_device("cuda")
    result = CliRunner().invoke(app, ["eval", "kl", "--device", "cuda"])
    assert result.exit_code == 2 and "finds no CUDA device" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(InputError, match="there are 2 CUDA devices, 0 to 1"):
        pick_device("cuda:2")


def test_packed_formats_need_kernels_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("oscar_kv.cli.eval_kl.cuda_available", lambda: False)
    arguments = ["eval", "kl", "--device", "cuda", "--formats", "k4v2:window=64"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "k4v2:window=64 runs through the packed kernels" in result.output
    assert "k4v2-twin" in result.output


def test_no_tf32_and_back() -> None:
    part = torch.backends.cuda.matmul
    before = part.fp32_precision
    try:
        part.fp32_precision = "tf32"
        with no_tf32():
            assert part.fp32_precision == "ieee"
        assert part.fp32_precision == "tf32"
    finally:
        part.fp32_precision = before
