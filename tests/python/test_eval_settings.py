# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Kept results: the settings beside them, their tables, and what a report does not show."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from oscar_kv.cli.app import app
from oscar_kv.eval import settings
from oscar_kv.eval.kl import DocumentResult, FormatResult
from oscar_kv.eval.report import write_report
from oscar_kv.eval.settings import content, model_sha256, run_settings
from test_eval_kl import document
from typer.testing import CliRunner


def result(name: str, values: list[torch.Tensor], bits: float = 3.0) -> FormatResult:
    """A format with the given KL, a tensor a document."""
    documents = [
        DocumentResult(f"d{i}", kl, torch.zeros(len(kl) - 1), kl < 1, bits + 1, bits, 0.5)
        for i, kl in enumerate(values)
    ]
    return FormatResult(name, name.upper(), False, documents)


def kept(**changes: Any) -> dict[str, Any]:
    """Settings as a file holds them."""
    plain = {
        "model": "tiny",
        "model_sha256": "0" * 64,
        "tokens": 200,
        "prompt": 100,
        "documents": ["d0"],
        "documents_sha256": "2" * 64,
        "along": "text",
        "stress": "none",
        "device": "cpu",
    }
    return plain | changes


def test_a_row_has_quantiles_and_the_worst_document() -> None:
    values = [torch.arange(0, 600) / 1000, torch.arange(400, 1001) / 1000]
    row = result("a", values).row()
    pooled = torch.cat(values).double()
    assert row["kl_median"] == pytest.approx(float(pooled.median()), abs=1e-3)
    assert row["kl_p99"] == pytest.approx(float(pooled.quantile(0.99)))
    assert row["kl_p99"] < row["kl_p999"] < 1
    assert row["kl_worst_document"] == pytest.approx(0.7) == row["documents"]["d1"]
    assert row["kl"] == pytest.approx((0.2995 + 0.7) / 2)


def test_settings_say_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"second")
    (tmp_path / "a.safetensors").write_bytes(b"first ")
    (tmp_path / "c.gguf").write_bytes(b"another kind")
    documents = [document(40, "one"), document(40, "two", seed=2)]
    model = tiny("llama")
    found = run_settings(model, "tiny", tmp_path, documents, 20, along="text", stress="6.0")
    assert found["model_sha256"] == hashlib.sha256(b"first second").hexdigest()
    assert (found["model"], found["tokens"], found["prompt"]) == ("tiny", 40, 20)
    assert found["documents"] == ["one", "two"] and found["stress"] == "6.0"
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["torch"] == torch.__version__ and found["tile_format"] >= 1
    assert found["date"].endswith("+00:00") and json.loads(json.dumps(found)) == found
    again = run_settings(model, "tiny", None, documents[::-1], 20, along="text", stress="none")
    assert again["model_sha256"] is None
    assert again["documents_sha256"] != found["documents_sha256"]
    file = content([result("a", [torch.ones(20)])], found)
    assert file["settings"] == found
    (row,) = file["rows"]
    assert (row["model"], row["tokens"], row["prompt"], row["device"]) == ("tiny", 40, 20, "cpu")
    assert (row["along"], row["stress"]) == ("text", "6.0")


def test_a_model_is_read_once_a_process(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"weights")
    first = model_sha256(file)
    assert first == hashlib.sha256(b"weights").hexdigest()
    file.unlink()
    assert model_sha256(file) == first
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no weights"):
        model_sha256(tmp_path / "empty")


def test_the_commit_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkout, and of an environment in it that holds the same files; else None."""
    inside = tmp_path / ".venv" / "oscar_kv"
    for package in (tmp_path / "python" / "oscar_kv", inside):
        (package / "eval").mkdir(parents=True)
        (package / "eval" / "settings.py").write_text("x = 1\n")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    def commit(package: Path) -> str | None:
        settings.source_commit.cache_clear()
        monkeypatch.setattr(settings, "__file__", str(package / "eval" / "settings.py"))
        return settings.source_commit()

    try:
        assert commit(inside) is None
        git("init", "--quiet")
        git("add", "python")
        git("commit", "--quiet", "-m", "one")
        known = commit(tmp_path / "python" / "oscar_kv")
        assert known is not None and len(known) >= 7 and known == commit(inside)
        (tmp_path / "python" / "oscar_kv" / "eval" / "settings.py").write_text("x = 2\n")
        assert commit(tmp_path / "python" / "oscar_kv") == f"{known}-dirty"
        assert commit(inside) is None  # built from something else
        shutil.copy(tmp_path / "python" / "oscar_kv" / "eval" / "settings.py", inside / "eval")
        assert commit(inside) == f"{known}-dirty"
        monkeypatch.setenv("PATH", "")
        assert commit(inside) is None  # no git
    finally:
        settings.source_commit.cache_clear()


def row(name: str, bits: float, kl: float, real: bool) -> dict[str, Any]:
    return {"format": name, "label": name.upper(), "bits": bits + 1, "packed_bits": bits,
            "kl": kl, "kl_stderr": None, "dnll": 0.5, "top1": 0.75, "documents": {"d0": kl},
            "packed_kernels": real}  # fmt: skip


def write(file: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    found = kept(**changes)
    whole = {"settings": found, "rows": [one | found | one for one in rows]}
    file.write_text(json.dumps(whole))
    return str(file)


HEAD = [
    "| format | setting | packed bits | bits | KL | dNLL | top-1 |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
]


def table(*files: str) -> list[str]:
    found = CliRunner().invoke(app, ["eval", "table", *files])
    assert found.exit_code == 0, found.output
    return found.stdout.splitlines()


def test_table_of_kept_results(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", [row("a", 3, 0.2, False), row("b", 2, 0.1, False)])
    second = write(tmp_path / "b.json", [row("b", 2, 0.3, True), row("c", 2, 0.2, False)])
    assert table(first, second) == [
        "tiny: 1 documents of 200 tokens, 100 prefilled exactly",
        "",
        *HEAD,
        "| `c` | C | 2.000 | 3.000 | 0.2000 | +0.5000 | 0.750 |",
        "| **`b`** | B | 2.000 | 3.000 | 0.3000 | +0.5000 | 0.750 |",
        "| `a` | A | 3.000 | 4.000 | 0.2000 | +0.5000 | 0.750 |",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": "other"}, "other: 1 documents of 200 tokens, 100 prefilled exactly"),
        ({"model_sha256": "1" * 64}, "tiny: 1 documents of 200 tokens, 100 prefilled exactly"),
        ({"documents_sha256": "1" * 64}, "tiny: 1 documents of 200 tokens, 100 prefilled exactly"),
        ({"tokens": 300}, "tiny: 1 documents of 300 tokens, 100 prefilled exactly"),
        ({"prompt": 50}, "tiny: 1 documents of 200 tokens, 50 prefilled exactly"),
        ({"stress": "6.0"}, "tiny: 1 documents of 200 tokens, 100 prefilled exactly, stress 6.0"),
        (
            {"along": "generation"},
            "tiny: 1 documents of 200 tokens, 100 prefilled exactly, "
            "along the model's own generation",
        ),
    ],
)
def test_what_cannot_be_compared_stands_apart(
    tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    files = [
        write(tmp_path / "a.json", [row("a", 3, 0.2, False)]),
        write(tmp_path / "b.json", [row("a", 3, 0.1, False)], **change),
    ]
    lines = table(*files)
    assert lines[5:] == [
        "",
        line,
        "",
        *HEAD,
        "| `a` | A | 3.000 | 4.000 | 0.1000 | +0.5000 | 0.750 |",
    ]


def test_table_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    old, broken, words = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    old.write_text(json.dumps([row("a", 3, 0.2, False)]))
    broken.write_text(json.dumps({"settings": {}, "rows": [{"format": "a"}]}))
    words.write_text("words")
    for file, word in (
        (old, "is a list without settings"),
        (broken, "is not what eval kl wrote"),
        (words, "is not what eval kl wrote"),
        (tmp_path / "none.json", "cannot read"),
    ):
        found = CliRunner().invoke(app, ["eval", "table", str(file)])
        assert found.exit_code == 2 and file.name in found.output and word in found.output


def test_a_report_says_what_lies_below_its_axes(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    large, small = torch.full((64,), 1e-2), torch.full((64,), 1e-7)
    mixed = torch.cat([small[:32], large[:32]])
    shown = [result("large", [large]), result("mixed", [mixed], 4.0)]
    write_report(page, shown[:1], kept())
    assert "Below" not in page.read_text() and "documents: d0" in page.read_text()
    write_report(page, [*shown, result("small", [small], 8.0)], kept())
    notes = [line for line in page.read_text().splitlines() if "Below" in line]
    assert notes == [
        "<p>Below 1e-06 nats, drawn at the start of the axis: small.</p>",
        "<p>Below 1e-06 nats, drawn at the start of the axis: mixed, small.</p>",
    ]
    assert "99.9 %" in page.read_text()
