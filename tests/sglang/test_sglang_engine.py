# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""SGLang's real engine with a real model on the CPU.

As in tests/vllm/test_engine.py, runs are compared by the KL divergence of their next-token
distributions, weights in float32: a cache of few bits turns rounding noise into quantisation steps,
so two runs of the same text are not alike to the last bit.
"""

import pytest
import sglang_run
import torch
from engine_model import in_transformers, kl, prompts

LENGTHS = [300, 520, 700, 900]
EXACT = "torch_native"
COLD = {"disable_radix_cache": True}
FIRST = 64


def requests(tokens, count=4):
    return [{"tokens": prompt, "max_tokens": count} for prompt in tokens]


def divergence(a, b, first=FIRST):
    """Mean KL over the prompts' positions from `first` on (a number, or one a prompt)."""
    firsts = first if isinstance(first, list) else [first] * len(a)
    return torch.cat([kl(x, y)[n:] for x, y, n in zip(a, b, firsts, strict=True)]).mean().item()


def states(run):
    return [request["hidden"] for request in run.requests]


@pytest.fixture(scope="module")
def tokens():
    return prompts(LENGTHS)


@pytest.fixture(scope="module")
def exact(tokens):
    """SGLang's own cache."""
    return states(sglang_run.run([[r] for r in requests(tokens)], EXACT, **COLD))


@pytest.fixture(scope="module")
def twice(tokens):
    """Each prompt alone, and then all of them again: their whole pages are found."""
    calls = [[request] for request in requests(tokens)]
    run = sglang_run.run(calls + calls)
    half = len(calls)
    return run.requests[:half], run.requests[half:]


@pytest.fixture(scope="module")
def alone(twice):
    return [request["hidden"] for request in twice[0]]


def test_the_same_cache_as_in_transformers(tokens, exact, alone):
    packed = divergence(exact, alone)
    there = in_transformers(tokens, "k2v2")
    dense = in_transformers(tokens, None)
    print(f"KL of packing {packed:.4f}, in transformers {divergence(dense, there):.4f}")
    print(f"KL between the packed caches {divergence(there, alone):.4f}")
    assert divergence(dense, exact) < 1e-5
    assert packed == pytest.approx(divergence(dense, there), rel=0.15)
    assert divergence(there, alone) < 0.5 * packed


def test_in_a_batch_and_in_chunks(tokens, exact, alone):
    together = sglang_run.run(
        [requests(tokens)], chunked_prefill_size=256, enable_mixed_chunk=True, **COLD
    )
    found = divergence(alone, states(together))
    print(f"KL of a batch in chunks {found:.4f}")
    assert found < 0.5 * divergence(exact, alone)
    assert all(len(request["tokens"]) == 4 for request in together.requests)


def test_prefix_hits(tokens, exact, alone, twice):
    cold, warm = twice
    assert [request["cached"] for request in cold] == [0] * len(tokens)
    hits = [(len(prompt) - 1) // 128 * 128 for prompt in tokens]
    assert [request["cached"] for request in warm] == hits
    found = divergence(exact, [request["hidden"] for request in warm], 0)
    usual = divergence(exact, alone, hits)
    print(f"KL after a hit {found:.4f}, of the same positions from cold {usual:.4f}")
    assert found < 2 * usual


def test_retraction(tokens, exact):
    """SGLang's own switch takes requests out of the batch now and then: they start again."""
    often = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    call = [{"tokens": x, "max_tokens": 24} for x in prompts([250] * 4, start=30_000)]
    run = sglang_run.run([call, *([r] for r in requests(tokens))], environment=often)
    assert [len(request["tokens"]) for request in run.requests] == [24] * 4 + [4] * 4
    assert "#retracted_reqs: 1" in run.log
    after = [request["hidden"] for request in run.requests[4:]]
    assert 0 < divergence(exact, after) < 0.15


def test_formats_in_order_and_a_balance(tokens, exact, alone, tmp_path):
    measured = {"OSCAR_KV_BALANCE": "auto", "OSCAR_KV_CACHE": str(tmp_path)}
    calls = [[request] for request in requests(tokens)]
    runs = [
        sglang_run.run(calls, environment=measured, **COLD),
        sglang_run.run(calls, "oscar_k4v4", **COLD),
    ]
    costs = [divergence(exact, alone), *(divergence(exact, states(run)) for run in runs)]
    print(f"KL k2v2 {costs[0]:.4f}, with a balance {costs[1]:.4f}, k4v4 {costs[2]:.4f}")
    assert costs[0] > 1.1 * costs[1] and costs[1] > 3 * costs[2] > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"page_size": 16}, "page_size is 16, must be a multiple of 32"),
        ({"kv_cache_dtype": "bf16"}, "kv_cache_dtype is bf16, must be auto"),
    ],
)
def test_refused_at_start(options, reason):
    with pytest.raises(RuntimeError, match=reason):
        sglang_run.run([], **options)
