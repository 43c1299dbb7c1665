# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The model and texts that the engines serve in tests, and how two runs of them are compared."""

from __future__ import annotations

import functools
import itertools
import os
import pydoc_data.topics
from pathlib import Path

import torch

MODEL = Path(os.environ.get("OSCAR_ENGINE_MODEL", "build/engine-model")).resolve()
CHUNK = 512


@functools.cache
def _tokens():
    from transformers import AutoTokenizer

    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return tuple(AutoTokenizer.from_pretrained(MODEL)(text, verbose=False).input_ids)


def prompts(lengths, start=0):
    """Token ids of real text, the language reference that comes with every Python.

    One piece for each length, one after the other, so that none begins like another.
    """
    ids, result, first = _tokens(), [], start
    for length in lengths:
        first = first % (len(ids) - length)
        result.append(list(ids[first : first + length]))
        first += length
    return result


@functools.cache
def head():
    """The output embedding, float32."""
    from safetensors import safe_open

    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        name = "lm_head.weight" if "lm_head.weight" in file.keys() else "model.embed_tokens.weight"  # noqa: SIM118
        return file.get_tensor(name).float()


def kl(reference, other):
    """KL divergence of the next-token distributions of two runs of one request, a position each.

    reference, other: last hidden states [positions, hidden_size], NaN where nothing was computed;
    only positions that both computed.
    """
    length = min(len(reference), len(other))
    both = ~(reference[:length, 0].isnan() | other[:length, 0].isnan())
    parts = []
    for rows in both.nonzero().flatten().split(256):
        p, q = (torch.log_softmax(x[rows] @ head().T, -1) for x in (reference, other))
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def in_transformers(tokens, format, balance=None):
    """Last hidden states of each prompt; format None: the exact cache."""
    import oscar_kv
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    oscar_kv.enable(model)
    results = []
    for prompt in tokens:
        cache = (
            DynamicCache(config=model.config)
            if format is None
            else oscar_kv.OscarCache(model.config, format=format, balance=balance, strict=True)
        )
        ids, parts = torch.tensor([prompt]), []
        # The first call of a cache is exact: as many tokens as are exact anyway.
        cuts = [0, 32, *range(CHUNK, len(prompt), CHUNK), len(prompt)]
        with torch.no_grad():
            for first, end in itertools.pairwise(cuts):
                step = model.model(ids[:, first:end], past_key_values=cache, use_cache=True)
                parts.append(step.last_hidden_state[0])
        results.append(torch.cat(parts))
    return results
