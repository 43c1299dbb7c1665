# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""KL divergence to the exact cache, in vLLM and in transformers, on the same texts.

    python tests/vllm/measure_kl.py [--format k2v2] [--balance FILE] [--prompts 20]

Every position of every prompt is computed by a query that reads by position alone (`strict`), in
float32 weights; the mean is over the positions from 64 on, where something is packed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))

import engine
import engine_model
from engine_model import CHUNK, prompts

LENGTHS = [1024] * 6 + [1536] * 5 + [2048] * 4 + [3072] * 3 + [4096, 6000]
FIRST = 64


def in_vllm(tokens, kv_cache_dtype, balance=None):
    """Hidden states of each prompt."""
    options = {"kv_cache_dtype": kv_cache_dtype, "enable_prefix_caching": False}
    if balance:
        options["additional_config"] = {"oscar_kv": {"balance": balance}}
    calls = [[{"tokens": prompt, "max_tokens": 1}] for prompt in tokens]
    return engine.run(calls, max_num_batched_tokens=CHUNK, **options).requests


def in_transformers(tokens, *settings):
    """Hidden states of each prompt."""
    return [{"hidden": x} for x in engine_model.in_transformers(tokens, *settings)]


def mean_kl(reference, other):
    """Mean over all positions of all prompts."""
    values = [engine.kl(a, b)[FIRST:] for a, b in zip(reference, other, strict=True)]
    return torch.cat(values).mean().item()


def main():
    """Prints the four figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", default="k2v2")
    parser.add_argument("--balance")
    parser.add_argument("--prompts", type=int, default=len(LENGTHS))
    options = parser.parse_args()
    tokens = prompts(LENGTHS[:: len(LENGTHS) // options.prompts])
    here = in_vllm(tokens, "oscar_" + options.format, options.balance)
    exact = in_vllm(tokens, "auto")
    there = in_transformers(tokens, options.format, options.balance)
    dense = in_transformers(tokens, None)
    print(f"{len(tokens)} prompts, {sum(len(x) for x in tokens)} tokens, {options.format}")
    print(f"vLLM, packed against exact cache:         {mean_kl(exact, here):.5f}")
    print(f"transformers, packed against exact cache: {mean_kl(dense, there):.5f}")
    print(f"exact caches, vLLM against transformers:  {mean_kl(dense, exact):.2e}")
    print(f"packed caches, vLLM against transformers: {mean_kl(there, here):.5f}")


if __name__ == "__main__":
    main()
