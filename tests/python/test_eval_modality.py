# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The modality stress: it changes nothing exactly, and our packed codes not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import tiny
from oscar_kv.cache import PagedCache
from oscar_kv.cli import eval_kl
from oscar_kv.cli.app import app
from oscar_kv.cli.models import LoadedModel
from oscar_kv.eval.codec import Codec, LayerCodes, LayerInput, sliding_packed
from oscar_kv.eval.formats import make_format
from oscar_kv.eval.kl import Document, evaluate
from oscar_kv.eval.modality import ModalityStress, key_factors, make_spans
from oscar_kv.eval.twin import Twin
from test_eval_kl import Letters, document
from typer.testing import CliRunner

TOKENS, PROMPT = 400, 200


class Verbatim(Codec):
    """Keeps what it gets, and remembers it."""

    name = label = "verbatim"

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        return 3.0, 5.0

    def encode(self, layer: LayerInput) -> LayerCodes:
        self.seen = layer
        packed = sliding_packed(layer.prompt, layer.tokens, 0)
        return LayerCodes(layer.k, layer.v, packed, packed)


def layer_input() -> LayerInput:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, TOKENS, 64, generator=generator) for n in (4, 2, 2))
    return LayerInput(layer=0, prompt=PROMPT, q=q, k=k, v=v, k_pre_rope=k)


def test_spans_fill_the_text_in_turn() -> None:
    spans = make_spans(1000)
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == 1000
    assert [span.kind for span in spans[:4]] == ["text", "image", "audio", "text"]
    assert all(16 <= span.stop - span.start <= 96 for span in spans[:-1])
    assert any(span.start % 32 for span in spans)  # groups of 32 hold several kinds
    assert make_spans(1000, seed=1) != spans


def test_a_format_sees_scaled_keys_and_its_reader_does_not() -> None:
    inner = Verbatim()
    layer = layer_input()
    stress = ModalityStress(inner, 4.0)
    codes = stress.encode(layer)
    factors = key_factors(TOKENS, 4.0)
    assert sorted(factors.unique().tolist()) == [0.25, 1.0, 4.0]
    assert torch.equal(inner.seen.k, layer.k * factors[:, None])
    assert inner.seen.k_pre_rope is not None
    assert torch.equal(inner.seen.k_pre_rope, inner.seen.k)
    assert torch.equal(inner.seen.q, layer.q) and torch.equal(inner.seen.v, layer.v)
    assert torch.equal(codes.k, layer.k)  # powers of two: not even rounding
    assert stress.bits(64, 2) == (3.0, 5.0)
    with pytest.raises(ValueError, match="modality stress is 0"):
        ModalityStress(inner, 0)


@pytest.mark.parametrize("balance", ["auto", "none", "file"])
def test_a_packed_format_is_taken_through_the_same_twin(balance: str) -> None:
    twin = ModalityStress(make_format(f"k4v2:balance={balance},window=64"), 4.0).inner
    assert isinstance(twin, Twin)
    measured = "none" if balance == "none" else "prompt"
    assert (twin.center, twin.feedback) == (measured, measured)
    assert twin.balance == ("prompt" if balance == "auto" else balance)
    assert (twin.k_bits, twin.v_bits, twin.window, twin.sinks) == (4, 2, 64, 4)


def test_exact_model_is_unchanged_and_formats_differ() -> None:
    """Stress moves a format that shares ranges among tokens, not one with a norm a token."""
    model = tiny("llama")
    plain = [make_format(name) for name in ("k2v2:balance=none", "kivi")]
    formats = [Verbatim(), *plain, *(ModalityStress(one, 4.0) for one in (Verbatim(), *plain))]
    one = Document("one", "text", document(TOKENS).ids)
    nothing, ours, kivi, also_nothing, hard, hard_kivi = (
        result.kl for result in evaluate(model, [one], formats, PROMPT)
    )
    assert abs(nothing) < 1e-6 and abs(also_nothing) < 1e-6
    assert hard == pytest.approx(ours, rel=0.1)
    assert hard_kivi > 1.5 * kivi


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel("tiny", tiny("llama"), Letters())
    monkeypatch.setattr(eval_kl, "load_model", lambda *_: loaded)
    text = tmp_path / "a.txt"
    text.write_text("All that is gold does not glitter. " * 20, encoding="utf-8")
    options = ["--text", text, "--formats", "k2v2,kivi:g=32,r=64", "--tokens", 256]

    def run(*more: object) -> dict[str, float]:
        arguments = [str(one) for one in (*options, "--json", "-", *more)]
        result = CliRunner().invoke(app, ["eval", "kl", *arguments])
        assert result.exit_code == 0, result.output
        return {row["format"]: row["kl"] for row in json.loads(result.stdout)["rows"]}

    plain, stressed = run(), run("--modality-stress", 4)
    assert list(stressed) == ["k2v2-twin", "kivi:g=32,r=64"]
    assert stressed["kivi:g=32,r=64"] > plain["kivi:g=32,r=64"]
    arguments = [str(one) for one in (*options, "--modality-stress", 4)]
    assert "stress modality 4.0" in CliRunner().invoke(app, ["eval", "kl", *arguments]).stdout


def test_packed_codes_do_not_change_at_all() -> None:
    """The kernels factor each key's norm out, and 4 is a step of the stored norms."""
    layer = layer_input()
    keys = layer.k.transpose(0, 1).contiguous()
    factors = key_factors(TOKENS, 4.0)
    pages = []
    for k in (keys, keys * factors[:, None, None]):
        cache = PagedCache(1, 2, 64, torch.float32, window=0, sinks=0)
        cache.append(k, keys)
        pages.append(cache)
    plain, scaled = (cache.dequantize()[0][0] for cache in pages)
    torch.testing.assert_close(scaled, plain * factors[:, None], rtol=0, atol=0)
    different = (pages[0].pool.storage != pages[1].pool.storage).sum()
    assert 0 < different <= 2 * TOKENS  # the norms' bytes only
