# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The transformers integration on a CUDA device, against the CPU."""

import accelerate
import oscar_kv
import pytest
import torch
from oscar_kv.bench import decode
from oscar_kv.hf import OscarCache
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    not oscar_kv.cuda_available(), reason="no CUDA kernels in this build, or no usable GPU"
)


@pytest.fixture(scope="module")
def models():
    """One small model, float32 on the CPU and on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).eval()
    gpu = LlamaForCausalLM(config).eval()
    gpu.load_state_dict(model.state_dict())
    return oscar_kv.enable(model), oscar_kv.enable(gpu.cuda())


def prompt(batch=1, tokens=150, seed=0):
    return torch.randint(0, 300, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_by_pieces(model, ids, pieces):
    cache, out, start = OscarCache(model.config, balance="auto"), [], 0
    for size in pieces:
        part = ids[:, start : start + size].to(model.device)
        out.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits.cpu())
        start += size
    cache.check()
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("pieces", [[150], [100, 1, 1, 1, 47], [100, 5, 45], [40] * 3 + [30]])
def test_logits_are_those_of_the_cpu(models, pieces):
    ids = prompt(2, sum(pieces))
    cpu, _ = logits_by_pieces(models[0], ids, pieces)
    gpu, cache = logits_by_pieces(models[1], ids, pieces)
    assert cache.dequantizations == 0
    # A CPU's int8 path and the GPU's fp16 path differ in the last bits of the weights.
    assert (gpu - cpu).norm() <= 3e-2 * cpu.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("first", [0, 1])
def test_a_model_on_two_gpus(models, first):
    """Layers on either GPU, as ``device_map="auto"`` splits a model: the bits of one GPU."""
    pieces, ids = [100, 1, 1, 5, 1, 40, 1], prompt(2, 149)
    second = 1 - first
    places = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
    places |= {"model.layers.1": second, "model.layers.2": first, "model.norm": second}
    model = LlamaForCausalLM(models[1].config).eval()
    model.load_state_dict(models[1].state_dict())
    model = accelerate.dispatch_model(model, {**places, "lm_head": second}, main_device=first)
    expected, one = logits_by_pieces(models[1], ids, pieces)
    found, two = logits_by_pieces(oscar_kv.enable(model), ids, pieces)
    assert [layer.device.index for layer in two.layers] == [first, second, first]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    for a, b in zip(one.layers, two.layers, strict=True):
        for x, y in zip(a.paged.dequantize(), b.paged.dequantize(), strict=True):
            assert torch.equal(x.cpu(), y.cpu())


def test_feedback_is_measured_on_the_gpu_as_on_the_cpu(models):
    ids = prompt(1, 200)
    _, cpu = logits_by_pieces(models[0], ids, [200])
    _, gpu = logits_by_pieces(models[1], ids, [200])
    measured, expected_all = gpu.calibrated(), cpu.calibrated().feedback
    assert measured.feedback.keys() == expected_all.keys() != set()
    for layer, expected in expected_all.items():
        found = measured.feedback[layer]
        assert found.device.type == "cuda"
        # Weights of fp32 queries whose products the two devices add in other orders.
        torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=2e-2)
    again = OscarCache(models[1].config, balance=measured)
    with torch.no_grad():
        models[1](input_ids=ids.cuda(), past_key_values=again, use_cache=True)
    for a, b in zip(again.layers, gpu.layers, strict=True):
        assert torch.equal(a.paged.feedback, b.paged.feedback)
        assert all(
            torch.equal(x, y)
            for x, y in zip(a.paged.dequantize(), b.paged.dequantize(), strict=True)
        )


def test_generate_with_padding(models):
    ids = prompt(3, 60)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    mask[2, :20] = 0
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    together = models[1].generate(ids.cuda(), attention_mask=mask.cuda(), **options)
    alone = models[1].generate(ids[2:, 20:].cuda(), **options)
    for a, b in zip(together.logits, alone.logits, strict=True):
        assert (a[2] - b[0]).norm() <= 1e-2 * b[0].norm()


def test_a_nan_in_the_forward_pass_is_heard_at_the_end_of_generate(models):
    model = models[1]
    weight = model.model.layers[1].self_attn.v_proj.weight
    saved = weight[0, 0].clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(ValueError, match=r"layer 1.*not finite"):
            model.generate(prompt(1, 40).cuda(), max_new_tokens=1, do_sample=False, pad_token_id=0)
    finally:
        with torch.no_grad():
            weight[0, 0] = saved


@pytest.mark.parametrize("name", decode.CACHES)
def test_the_decode_benchmark_measures_memory_and_replays_a_graph(name):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
    )
    model = decode.random_model(config, torch.device("cuda"))
    row = decode.measure("tiny", model, name, 2, 2048, steps=2)
    dense = 2 * 2 * 2 * 2048 * 128 * 2  # K and V of two layers and sequences, 16 bits
    assert row.graph_ms is not None and row.graph_ms > 0
    assert row.cache_bytes < 0.4 * dense if name == decode.PACKED else row.cache_bytes >= dense
