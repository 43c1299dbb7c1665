# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The torch ops: registration, agreement with dense attention, and every refusal."""

import os
import subprocess
import sys

import pytest
import torch
from oscar_kv import PagedCache, _core, active_backend, available_backends, ops, set_backend
from oscar_kv.calibration import Calibration

KV_HEADS, Q_HEADS, HEAD_DIM = 2, 6, 64
# Relative error of `attend` against float64 on the same codes: float paths, int8 paths.
TOLERANCE = {"reference": 1e-3, "scalar": 1e-3, "avx2": 2e-2, "avx512vnni": 2e-2, "neon": 2e-2}


@pytest.fixture(params=available_backends())
def backend(request):
    set_backend(request.param)
    yield request.param
    set_backend("auto")


def filled(tokens=150, batch=2, dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    cache = PagedCache(batch, KV_HEADS, HEAD_DIM, dtype, **options)
    rows = (batch * tokens, KV_HEADS, HEAD_DIM)
    k = torch.randn(rows, generator=generator).to(dtype)
    v = torch.randn(rows, generator=generator).to(dtype)
    cache.append(k, v)
    return cache


def new_rows(tokens, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def rows(heads):
        return torch.randn((tokens, heads, HEAD_DIM), generator=generator).to(dtype)

    return rows(Q_HEADS), rows(KV_HEADS), rows(KV_HEADS)


def append_arguments(cache, k, v):
    start = torch.tensor([0, k.shape[0]], dtype=torch.int32)
    return [
        cache.pool.storage,
        cache.exact,
        cache.block_table,
        cache.slot,
        cache.seq_len,
        cache.exact_from,
        cache.balance,
        k,
        v,
        start,
        cache.format,
        cache.window,
        cache.sinks,
        "both",
    ]


def attend_arguments(cache, q, k, v):
    tensors = append_arguments(cache, k, v)[:7]
    start = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    options = [cache.format, cache.window, cache.sinks, HEAD_DIM**-0.5, 0.0, 0, None, False]
    return [q, k, v, *tensors, start, *options]


@pytest.mark.parametrize("fmt", ["k2v2", "k4v2", "k4v4"])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 127, 128, 129, 300])
def test_attend_equals_dense_attention_on_the_dequantised_cache(backend, fmt, tokens):
    cache = filled(tokens, format=fmt)
    q, k, v = new_rows(2)
    out, lse = cache.attend(q, k, v, scale=HEAD_DIM**-0.5)
    keys, values = (x.double() for x in cache.dequantize())
    keys = torch.cat([keys, k[:, :, None].double()], 2).repeat_interleave(3, 1)
    values = torch.cat([values, v[:, :, None].double()], 2).repeat_interleave(3, 1)
    scores = torch.einsum("bhd,bhtd->bht", q.double(), keys) * HEAD_DIM**-0.5
    expected = torch.einsum("bht,bhtd->bhd", scores.softmax(-1), values)
    assert (out - expected).norm() <= TOLERANCE[backend] * expected.norm()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-2, rtol=0)


def test_a_flipped_bit_of_a_packed_page_changes_the_output(backend):
    cache = filled()
    q, k, v = new_rows(2)
    before, _ = cache.attend(q, k, v, scale=HEAD_DIM**-0.5)
    page = cache.block_table[0, 0]
    cache.pool.storage[page, 0, 1, 40] ^= 2
    after, _ = cache.attend(q, k, v, scale=HEAD_DIM**-0.5)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])  # the other sequence has pages of its own


def test_opcheck_append():
    cache = filled(60, batch=1)
    cache.append(*new_rows(3)[1:])
    cache.pool.reserve(4)
    _, k, v = new_rows(40)
    cache._make_room([40])
    torch.library.opcheck(ops.append, tuple(append_arguments(cache, k, v)))


def test_opcheck_attend():
    cache = filled(100, batch=1)
    torch.library.opcheck(ops.attend, tuple(attend_arguments(cache, *new_rows(2))))


def test_attend_traces_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        cache_like = [torch.empty(3, 2, 4, 1184, dtype=torch.uint8), torch.empty(1, 2, 2, 68, 64)]
        table = torch.empty(1, 16, dtype=torch.int32)
        one = torch.empty(1, dtype=torch.int32)
        q, k = torch.empty(5, 6, 64, dtype=torch.bfloat16), torch.empty(5, 2, 64)
        start = torch.empty(2, dtype=torch.int32)
        options = ["k2v2", 32, 4, 1.0, 0.0, 0, None, False]
        arguments = [q, k, k, *cache_like, table, one, one, None, None, start, *options]
        out, lse = ops.attend(*arguments)
    assert out.shape == (5, 6, 64) and out.dtype == torch.bfloat16
    assert lse.shape == (5, 6) and lse.dtype == torch.float32


def test_environment_variable_forces_the_backend():
    script = "import oscar_kv; print(oscar_kv.active_backend())"
    for name in available_backends():
        result = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "OSCAR_BACKEND": name},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == name
    refused = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OSCAR_BACKEND": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "OSCAR_BACKEND is 'sse9'" in refused.stderr


def test_threads_are_those_of_torch_and_of_the_environment():
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert _core.max_threads() == threads
    finally:
        torch.set_num_threads(before)
    script = "from oscar_kv import _core; print(_core.max_threads())"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "1"


def test_set_backend_refuses_unknown_names():
    before = active_backend()
    with pytest.raises(ValueError, match="backend is 'neon7'"):
        set_backend("neon7")
    assert active_backend() == before


def spoil(index, change):
    def apply(arguments):
        arguments[index] = change(arguments[index])

    return apply


def set_item(index, position, value):
    def apply(arguments):
        arguments[index] = arguments[index].clone()
        arguments[index][position] = value

    return apply


def poisoned(rows, value):
    rows = rows.clone()
    rows[3, 1, 7] = value
    return rows


APPEND_REFUSALS = [
    (spoil(7, lambda k: k.double()), TypeError, "k has dtype float64"),
    (spoil(7, lambda k: k[:, :, :32]), ValueError, r"k has shape \[40, 2, 32\]"),
    (spoil(8, lambda v: v[:, :1]), ValueError, "v has 40 tokens and 1 heads"),
    (spoil(8, lambda v: v[:7]), ValueError, "v has 7 tokens"),
    (
        spoil(7, lambda k: k.transpose(1, 2).contiguous().transpose(1, 2)),
        ValueError,
        "k has stride 2 in head_dim",
    ),
    (spoil(7, lambda k: k.to("meta")), ValueError, "on cpu and meta, must be on one"),
    (spoil(7, lambda k: poisoned(k, float("nan"))), ValueError, r"k\[token 3, head 1, channel 7\]"),
    (spoil(8, lambda v: poisoned(v, float("inf"))), ValueError, r"v\[token 3, head 1, channel 7\]"),
    (spoil(8, lambda v: poisoned(v, -65505.0)), ValueError, "at most 65504"),
    (spoil(0, lambda pages: pages.int()), TypeError, "pages has dtype int32"),
    (spoil(0, lambda pages: pages[..., :-32]), ValueError, "pages has shape"),
    (spoil(1, lambda exact: exact[:, :, :, :-1]), ValueError, "exact has shape"),
    (spoil(1, lambda exact: exact[..., :40]), NotImplementedError, "head_dim is 40"),
    (spoil(2, lambda table: table.long()), TypeError, "block_table has dtype int64"),
    (spoil(2, lambda table: table[:, :0]), IndexError, "block_table has 0 pages"),
    (set_item(2, (0, 0), 99), IndexError, r"block_table\[0\]\[0\] is 99, must be 0 to"),
    (set_item(2, (0, 0), -1), IndexError, r"block_table\[0\]\[0\] is -1"),
    (set_item(3, 0, 5), ValueError, r"slot\[0\] is 5, must be 0 to 0"),
    (set_item(4, 0, -4), ValueError, r"seq_len\[0\] is -4"),
    (set_item(5, 0, 50), ValueError, r"exact_from\[0\] is 50, must be 0 to 32"),
    (spoil(6, lambda _: torch.zeros(2, 64)), ValueError, "balance"),
    (spoil(6, lambda _: torch.ones(3, 64)), ValueError, r"balance has shape \[3, 64\]"),
    (set_item(9, 1, 39), ValueError, r"query_start\[1\] is 39, must be 40"),
    (spoil(9, lambda start: start[:1]), ValueError, "query_start has shape"),
    (spoil(10, lambda _: "k3v3"), ValueError, "format is 'k3v3', must be k2v2, k4v2 or k4v4"),
    (spoil(11, lambda _: -1), ValueError, "window is -1"),
    (spoil(12, lambda _: 33), ValueError, "sinks is 33, must be 0 to 32"),
    (spoil(13, lambda _: "half"), ValueError, "part is 'half'"),
]


@pytest.mark.parametrize("change, error, message", APPEND_REFUSALS)
def test_append_refuses_and_writes_nothing(backend, change, error, message):
    cache = filled(60, batch=1)
    cache._make_room([40])
    _, k, v = new_rows(40)
    arguments = append_arguments(cache, k, v)
    before = cache.pool.storage.clone(), cache.exact.clone()
    change(arguments)
    with pytest.raises(error, match=message):
        ops.append(*arguments)
    assert torch.equal(cache.pool.storage, before[0])
    assert torch.equal(cache.exact, before[1])


ATTEND_REFUSALS = [
    (spoil(0, lambda q: q[:, :5]), ValueError, "q has 5 heads, must be 1 to 16 times the 2 KV"),
    (spoil(0, lambda q: q[:, :1]), ValueError, "q has 1 heads"),
    (spoil(0, lambda q: q.repeat(1, 6, 1)), ValueError, "q has 36 heads"),
    (spoil(0, lambda q: q.long()), TypeError, "q has dtype int64"),
    (spoil(0, lambda q: q[0]), ValueError, "q has shape"),
    (spoil(1, lambda k: k[:1]), ValueError, "k_new has 1 tokens"),
    (spoil(2, lambda v: v[..., :32]), ValueError, "v_new has shape"),
    (set_item(5, (0, 0), 77), IndexError, r"block_table\[0\]\[0\] is 77"),
    (spoil(5, lambda table: table[:, :0]), IndexError, "block_table has 0 pages"),
    (spoil(14, lambda _: float("nan")), ValueError, "scale is nan"),
    (spoil(15, lambda _: -1.0), ValueError, "softcap is -1"),
    (spoil(16, lambda _: -2), ValueError, "sliding_window is -2"),
    (spoil(17, lambda _: torch.zeros(2)), ValueError, r"sink_logits has shape \[2\]"),
    (spoil(17, lambda _: torch.zeros(6).half()), TypeError, "sink_logits has dtype float16"),
]


@pytest.mark.parametrize("change, error, message", ATTEND_REFUSALS)
def test_attend_refuses(change, error, message):
    arguments = attend_arguments(filled(60, batch=1), *new_rows(2))
    change(arguments)
    with pytest.raises(error, match=message):
        ops.attend(*arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_query_spoils_no_other_row(backend, value):
    cache = filled(200)
    q, k, v = new_rows(2)
    clean, _ = cache.attend(q, k, v, scale=HEAD_DIM**-0.5)
    q[0, 2, 5] = value
    out, _ = cache.attend(q, k, v, scale=HEAD_DIM**-0.5)
    assert not out[0, 2].isfinite().any()
    keep = torch.ones(2, Q_HEADS, dtype=torch.bool)
    keep[0, 2] = False
    assert torch.equal(out[keep], clean[keep])


def test_requires_grad_is_accepted():
    cache = filled(60, batch=1)
    q, k, v = new_rows(1)
    out, _ = cache.attend(q.requires_grad_(), k, v, scale=1.0)
    assert out.isfinite().all()


class Renamed(torch.Tensor):
    """A type of its own, which does not publish DLPack's C functions."""


@pytest.mark.parametrize("kind", ["numpy", "parameter", "subclass", "part"])
def test_arrays_that_are_no_plain_tensors_say_the_same(kind):
    """Plain tensors are read through torch's C functions, others through ``__dlpack__``."""
    cache = filled()
    q, k, v = new_rows(2)
    wanted, lse = cache.attend(q, k, v, scale=0.125)
    given = {
        "numpy": lambda x: x.numpy(),
        "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
        "subclass": lambda x: x.as_subclass(Renamed),
        "part": lambda x: torch.cat([x + 1, x], dim=2)[..., HEAD_DIM:],
    }[kind]
    out = given(torch.full_like(wanted, torch.nan))
    arguments = [given(x) for x in (q, k, v)]
    start = torch.tensor([0, 1, 2], dtype=torch.int32)
    workspace = torch.empty(cache._arrays().attend_workspace_bytes(2, Q_HEADS), dtype=torch.uint8)
    options = (cache.format, cache.window, cache.sinks, 0.125, 0.0, 0, None, False)
    _core.attend(cache._arrays(), *arguments, start, out, lse, workspace, *options)
    assert torch.equal(torch.as_tensor(out), wanted)


def test_arrays_of_no_kind_are_refused():
    cache = filled()
    q, _, v = new_rows(2)
    start = torch.tensor([0, 1, 2], dtype=torch.int32)
    for wrong in (None, [1.0], "k", q.to_sparse()):
        with pytest.raises((TypeError, BufferError)):
            _core.append(cache._arrays(), wrong, v, start, "k2v2", 32, 4, "both")


def test_center_of_the_ops_is_that_of_the_cache():
    calibration = Calibration(center=40 * torch.randn(KV_HEADS, HEAD_DIM))
    caches = [filled(0, batch=1, calibration=calibration) for _ in range(2)]
    turned = calibration.arrays()[2]
    rows = torch.randn(96, KV_HEADS, HEAD_DIM)
    caches[0].append(rows, rows)
    caches[1]._make_room([96])
    ops.append(*append_arguments(caches[1], rows, rows), None, turned)
    caches[1]._add_lengths([96])
    tiles = [cache.pool.storage[0, :, :3] for cache in caches]
    assert torch.equal(*tiles)
    q, k, v = new_rows(2)
    expected, _ = caches[0].attend(q, k, v, scale=HEAD_DIM**-0.5)
    found, _ = ops.attend(*attend_arguments(caches[1], q, k, v), 0, turned)
    assert torch.equal(found, expected)
    without, _ = ops.attend(*attend_arguments(caches[1], q, k, v))
    assert not torch.allclose(without, expected, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65505.0])
def test_center_that_append_refuses(value):
    cache = filled(0, batch=1)
    rows = torch.randn(32, KV_HEADS, HEAD_DIM)
    cache._make_room([32])
    center = torch.zeros(KV_HEADS, HEAD_DIM)
    center[1, 3] = value
    before = cache.pool.storage.clone()
    with pytest.raises(ValueError, match=r"center\[head 1, channel 3\] is .* at most 65504"):
        ops.append(*append_arguments(cache, rows, rows), None, center)
    assert torch.equal(cache.pool.storage, before)
