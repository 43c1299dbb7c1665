# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes of a block, sinks out of codes, the ledger, refusals: each part by itself."""

import logging
import pickle
import subprocess
import sys

import pytest
import torch
from harness import fake_config, make_impl
from oscar_kv import PagedCache, _core
from oscar_kv.calibration import Calibration
from oscar_kv.rotate import channel_signs, hadamard
from oscar_kv.serving.layout import DTYPES, SINKS, token_bytes
from oscar_kv.serving.sinks import restore_sinks, unpack_first
from oscar_kv.vllm import register, spec
from oscar_kv.vllm.cpu import PACKED, OscarCPUBackend, OscarCPUImpl
from oscar_kv.vllm.ledger import Ledger
from oscar_kv.vllm.register import cuda_backend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

FORMATS = ["k2v2", "k4v2", "k4v4"]


@pytest.mark.parametrize("block_tokens", spec.BLOCK_TOKENS)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("format", FORMATS)
def test_exact_copies_fit_into_their_blocks(format, head_dim, block_tokens):
    geometry = spec.Geometry(format, 3, head_dim, block_tokens)
    planes, heads, rows, dim = geometry.exact_shape
    assert 2 * planes * heads * rows * dim <= geometry.block_bytes
    assert geometry.exact_blocks * planes * rows == 2 * geometry.exact_rows


def test_blocks_of_the_default_format():
    assert [token_bytes(dim, "k2v2") for dim in (64, 128, 256)] == [37, 72, 140]
    blocks = [spec.Geometry("k2v2", 8, 128, n).exact_blocks for n in spec.BLOCK_TOKENS]
    assert blocks == [4, 2, 1]


def test_a_block_too_small_for_a_quarter_of_the_exact_copies():
    with pytest.raises(ValueError, match="block_size is 64"):
        _ = spec.Geometry("k2v2", 8, 128, 64).exact_blocks


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("format", FORMATS)
def test_sinks_out_of_codes_equal_the_library(format, head_dim):
    generator = torch.Generator().manual_seed(0)
    cache = PagedCache(1, 2, head_dim, torch.float32, format=format, window=0, sinks=0)
    rows = [torch.randn((64, 2, head_dim), generator=generator) for _ in range(2)]
    cache.append(*rows)
    dense = [torch.zeros(1, 2, 64, head_dim) for _ in range(2)]
    _core.dequantize(cache._arrays(), *dense, format, 0, 0)
    found = unpack_first(cache.pool.storage[0, :, 0], head_dim, format)
    for x, wanted in zip(found.unbind(-3), dense, strict=True):
        x = hadamard(x) * channel_signs(head_dim)
        torch.testing.assert_close(x, wanted[0, :, :SINKS], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_restored_sinks_have_balance_and_center(format):
    generator = torch.Generator().manual_seed(1)
    center = 30 * torch.randn((2, 64), generator=generator)
    balance = torch.linspace(0.5, 2, 128).view(2, 64)
    cache = PagedCache(
        1,
        2,
        64,
        torch.float32,
        format=format,
        window=0,
        sinks=0,
        calibration=Calibration(balance, center),
    )
    rows = [torch.randn((64, 2, 64), generator=generator) for _ in range(2)]
    cache.append(rows[0] + center, rows[1])
    wanted = cache.dequantize()
    exact = torch.zeros(1, 2, 2, 64 + SINKS, 64)
    first, slot = torch.zeros(1, dtype=torch.long), torch.zeros((1, 1), dtype=torch.long)
    restore_sinks(cache.pool.storage, exact, first, slot, format, cache.calibration)
    for side in (0, 1):
        torch.testing.assert_close(
            exact[0, side, :, -SINKS:], wanted[side][0, :, :SINKS], rtol=1e-4, atol=1e-3
        )


def step(ledger, rings, table, context, end):
    start = torch.tensor([0, end - context], dtype=torch.int32)
    parts = [torch.tensor([block], dtype=torch.int32) for block in rings]
    table = torch.tensor([table + [0] * (8 - len(table))], dtype=torch.int32)
    done = ledger.advance(40, table, parts, start, torch.tensor([end], dtype=torch.int32))
    written = done.pack_table[0].tolist()
    return int(done.exact_from[0]), bool(done.fresh[0]), [x for x in written if x]


def test_ledger_tells_a_hit_from_a_request_that_goes_on():
    ledger = Ledger(2, 128, 4)
    assert step(ledger, [1, 2], [3, 4], 0, 256) == (0, False, [3, 4])
    assert step(ledger, [1, 2], [3, 4, 5], 256, 257) == (0, False, [3, 4, 5])
    assert step(ledger, [1, 2], [3, 4, 5], 257, 300) == (0, False, [3, 4, 5])
    # Another request with the same first page, and other ring blocks. It writes no shared page.
    assert step(ledger, [6, 7], [3, 8], 64, 96) == (64, True, [8])
    assert step(ledger, [6, 7], [3, 8], 96, 128) == (64, False, [8])
    assert step(ledger, [6, 7], [3, 8], 128, 256) == (64, False, [8])
    assert step(ledger, [6, 7], [3, 8, 9], 256, 257) == (64, False, [8, 9])


@pytest.mark.parametrize("touched", [1, 2, 3])  # first and second ring block, page
def test_ledger_notices_what_others_wrote_in_between(touched):
    ledger = Ledger(2, 128, 4)
    step(ledger, [1, 2], [3], 0, 64)
    step(ledger, [10, 11], [touched], 0, 40)
    assert step(ledger, [1, 2], [3], 64, 129)[:2] == (64, True)


def test_ledger_a_hit_of_another_request_does_not_disturb():
    ledger = Ledger(2, 128, 4)
    step(ledger, [1, 2], [3], 0, 128)
    assert step(ledger, [6, 7], [3, 8], 64, 130) == (64, True, [8])
    assert step(ledger, [1, 2], [3, 9], 128, 129)[:2] == (0, False)


def test_ledger_ring_blocks_that_were_pages_together():
    ledger = Ledger(2, 128, 4)
    step(ledger, [1, 2], [3], 0, 64)
    step(ledger, [10, 11], [1, 2], 0, 256)  # both get the same stamp
    assert step(ledger, [1, 2], [3], 64, 129)[:2] == (64, True)


def test_ledger_ring_of_another_end_or_text():
    ledger = Ledger(1, 128, 4)
    step(ledger, [1], [3, 4], 0, 192)
    assert step(ledger, [1], [3], 64, 70)[:2] == (64, True)
    step(ledger, [1], [3, 4], 0, 192)
    step(ledger, [2], [3, 5], 0, 192)
    assert step(ledger, [1], [3, 5], 192, 200)[:2] == (192, True)


def test_ledger_refuses_more_requests_than_planned():
    with pytest.raises(RuntimeError, match="max_num_seqs is 0"):
        step(Ledger(1, 128, 0), [1], [3], 0, 5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speculative_config": object()}, "speculative_config"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"cache_config__kv_offloading_size": 4}, "kv_offloading_size is 4"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
        (
            {"parallel_config__prefill_context_parallel_size": 2},
            "prefill_context_parallel_size is 2",
        ),
        ({"parallel_config__enable_dbo": True}, "enable_dbo"),
        ({"cache_config__kv_cache_dtype_skip_layers": ["1"]}, "kv_cache_dtype_skip_layers"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "disable_hybrid"),
        ({"model_config__is_hybrid": True}, "state-space"),
        ({"cache_config__block_size": 64}, "block_size is 64"),
    ],
)
def test_engine_settings_refused(monkeypatch, changes, reason):
    config = fake_config(128, **changes)
    with pytest.raises((NotImplementedError, ValueError), match=reason):
        make_impl(monkeypatch, config, OscarCPUImpl, (6, 3, 64), "oscar_k2v2")


@pytest.mark.parametrize(
    ("shape", "arguments", "reason"),
    [
        ((6, 3, 40), {}, "head_dim is 40"),
        ((17, 1, 64), {}, "17 query heads on 1"),
        ((6, 3, 64), {"sliding_window": 128}, "sliding_window is 128"),
        ((6, 3, 64), {"alibi_slopes": [1.0]}, "ALiBi"),
        ((6, 3, 64), {"attn_type": "encoder_only"}, "attn_type is encoder_only"),
        ((6, 3, 64), {"kv_sharing_target_layer_name": "a.0"}, "KV cache of a.0"),
        ((6, 3, 64), {"sinks": torch.zeros(6)}, "sink logits"),
        ((6, 3, 64), {"chunk_lookback": 1}, "chunk_lookback"),
    ],
)
def test_layers_refused(monkeypatch, shape, arguments, reason):
    with pytest.raises(NotImplementedError, match=reason):
        make_impl(monkeypatch, fake_config(128), OscarCPUImpl, shape, "oscar_k2v2", **arguments)


def full_spec(head_dim, dtype=torch.uint8):
    return FullAttentionSpec(
        block_size=128,
        num_kv_heads=8,
        head_size=head_dim,
        head_size_v=head_dim,
        dtype=dtype,
        kv_quant_mode=KVQuantMode.CUSTOM,
    )


@pytest.mark.parametrize("format", FORMATS)
def test_pages_have_the_size_of_their_format(format):
    backend = PACKED[format]
    page = backend.customize_spec(full_spec(128))
    assert page.page_size_bytes == 8 * 4 * _core.tile_bytes(128, format)
    assert backend.customize_spec(page) == page


def test_other_dtypes_stay_with_vllm():
    assert OscarCPUBackend.get_builder_cls() is CPUAttentionBackend.get_builder_cls()
    plain = full_spec(128, torch.bfloat16)
    assert OscarCPUBackend.customize_spec(plain) == plain
    assert OscarCPUBackend.supports_kv_cache_dtype("auto")
    assert not OscarCPUBackend.supports_kv_cache_dtype("int4_none")


def test_registering_twice_and_an_unknown_release(monkeypatch, caplog):
    register()
    register()
    from vllm.config.cache import KV_CACHE_DTYPES

    assert [name for name in KV_CACHE_DTYPES if name.startswith("oscar")] == list(DTYPES)
    monkeypatch.setattr("vllm.version.__version__", "0.40.1")
    logger = logging.getLogger("vllm.oscar_kv")
    logger.addHandler(caplog.handler)
    register()
    logger.removeHandler(caplog.handler)
    assert "0.40.1" in caplog.text


def test_the_cuda_backend_reaches_a_process_that_has_not_loaded_the_plugin():
    read = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
    sent = pickle.dumps(cuda_backend())
    found = subprocess.run([sys.executable, "-c", read], input=sent, capture_output=True)
    assert found.stdout == b"AttentionBackendEnum.OSCAR_KV\n", found.stderr.decode()[-2000:]
