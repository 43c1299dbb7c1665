# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""PagedCache: lengths, pages, cropping, selection, memory."""

import itertools

import pytest
import torch
from oscar_kv import PagedCache

KV_HEADS, HEAD_DIM = 2, 32
SCALE = HEAD_DIM**-0.5


def rows(tokens, heads=KV_HEADS, seed=0):
    return torch.randn(
        (tokens, heads, HEAD_DIM), generator=torch.Generator().manual_seed(seed + tokens)
    )


def make(batch=1, **options):
    return PagedCache(batch, KV_HEADS, HEAD_DIM, torch.float32, **options)


def ask(cache, seed=5):
    q = rows(cache.batch, 4, seed)
    return cache.attend(q, rows(cache.batch, seed=seed), rows(cache.batch, seed=seed), scale=SCALE)[
        0
    ]


def feed(cache, k, v, sizes):
    """Appends rows of one sequence in pieces."""
    start = 0
    for size in sizes:
        cache.append(k[start : start + size], v[start : start + size])
        start += size


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [31, 1, 32, 33, 127, 76], [128, 128, 44]])
def test_pieces_do_not_matter(sizes):
    k, v = rows(300), rows(300, seed=1)
    whole, pieces = make(), make()
    whole.append(k, v)
    feed(pieces, k, v, sizes)
    assert whole.lengths == pieces.lengths == [300]
    for a, b in zip(whole.dequantize(), pieces.dequantize(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ask(whole), ask(pieces))


def test_ragged_batch_equals_single_sequences():
    lengths = [0, 5, 64, 201]
    k, v = rows(sum(lengths)), rows(sum(lengths), seed=1)
    starts = [0, 0, 5, 69, 270]
    together = make(batch=4)
    together.append(k, v, query_start=starts)
    assert together.lengths == lengths
    out = ask(together)
    q, new = rows(4, 4, 5), rows(4, seed=5)
    for b, (first, last) in enumerate(itertools.pairwise(starts)):
        alone = make()
        alone.append(k[first:last], v[first:last])
        single, _ = alone.attend(q[b : b + 1], new[b : b + 1], new[b : b + 1], scale=SCALE)
        assert torch.equal(single[0], out[b])


def test_pool_grows_by_pages_and_frees_them():
    cache = make(batch=3, page_tokens=64)
    assert cache.memory()["packed"] == 0
    page_bytes = 2 * 2 * 640  # 2 tiles of 640 bytes for each of 2 KV heads
    cache.append(rows(3 * 31), rows(3 * 31))
    assert cache.memory()["packed"] == 0
    cache.append(rows(3 * 2), rows(3 * 2))
    assert cache.memory()["packed"] == 3 * page_bytes
    cache.append(rows(3 * 288), rows(3 * 288))  # 321 tokens: 10 tiles, 5 pages
    assert cache.memory()["packed"] == 15 * page_bytes
    cache.select([1])
    assert cache.pool.used == 5
    assert cache.memory()["packed"] == 5 * page_bytes
    cache.reset()
    assert cache.memory()["packed"] == 0
    assert cache.lengths == [0]


def test_selection_shares_pages_and_copies_on_write():
    k, v = rows(2 * 160), rows(2 * 160, seed=1)
    cache = make(batch=2)
    cache.append(k, v)
    used = cache.pool.used
    cache.select([1, 1, 0])
    assert cache.pool.used == used  # nothing copied yet
    more_k, more_v = rows(3 * 40, seed=2), rows(3 * 40, seed=3)
    cache.append(more_k, more_v)
    for b, source in enumerate([1, 1, 0]):
        alone = make()
        alone.append(k[160 * source : 160 * source + 160], v[160 * source : 160 * source + 160])
        alone.append(more_k[40 * b : 40 * b + 40], more_v[40 * b : 40 * b + 40])
        for mine, its in zip(cache.dequantize(), alone.dequantize(), strict=True):
            assert torch.equal(mine[b], its[0])
    cache.select([2])
    assert cache.pool.used == 2


@pytest.mark.parametrize("length", [33, 64, 100, 200])
@pytest.mark.parametrize("removed", [1, 5, 32])
def test_crop_then_append_gives_the_same_tiles(length, removed):
    k, v = rows(400), rows(400, seed=1)
    cache, straight = make(), make()
    cache.append(k[:length], v[:length])
    cache.crop(removed)
    assert cache.lengths == [length - removed]
    cache.append(k[length - removed : 400], v[length - removed : 400])
    straight.append(k, v)
    for a, b in zip(cache.dequantize(), straight.dequantize(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ask(cache), ask(straight))


def test_crop_reads_packed_what_the_ring_has_lost():
    k, v = rows(200), rows(200, seed=1)
    cache, straight = make(), make()
    cache.append(k, v)
    cache.crop(32)
    straight.append(k[:168], v[:168])
    out, expected = ask(cache), ask(straight)
    # Tokens 128 to 135 lost their ring rows: their tile is read packed, nothing else differs.
    assert not torch.equal(out, expected)
    assert (out - expected).norm() < 0.5 * expected.norm()


def test_crop_beyond_the_window_is_refused():
    cache = make()
    cache.append(rows(200), rows(200))
    with pytest.raises(ValueError, match="crop: tokens is 60, must be 0 to 40"):
        cache.crop(60)
    assert cache.lengths == [200]
    cache.crop(32)
    with pytest.raises(ValueError, match="crop: tokens is 32, must be 0 to 8"):
        cache.crop(32)
    with pytest.raises(ValueError, match="crop: tokens is -1"):
        cache.crop(-1)


def test_crop_of_a_short_sequence_may_remove_all():
    cache = make()
    cache.append(rows(60), rows(60))
    cache.crop(60)
    assert cache.lengths == [0]


def test_balance_cannot_change_under_packed_tokens():
    cache = make()
    cache.append(rows(20), rows(20))
    cache.balance = torch.full((KV_HEADS, HEAD_DIM), 2.0)
    cache.append(rows(20), rows(20))
    with pytest.raises(ValueError, match="balance cannot change"):
        cache.balance = None


def test_exact_rows_are_the_newest():
    k, v = rows(150), rows(150)
    cache = make()
    cache.append(k, v)
    assert torch.equal(cache.exact_rows(0, 0), k[150 - cache.ring_tokens :])
    assert torch.equal(cache.exact_rows(0, 1), v[150 - cache.ring_tokens :])


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"format": "k1v1"}, ValueError, "format is 'k1v1'"),
        ({"window": -1}, ValueError, "window is -1"),
        ({"sinks": 40}, ValueError, "sinks is 40, must be 0 to 32"),
        ({"page_tokens": 100}, ValueError, "page_tokens is 100"),
        ({"device": "meta"}, ValueError, "device is meta"),
        ({"balance": torch.ones(3, 3)}, ValueError, "balance has shape"),
        ({"balance": torch.zeros(KV_HEADS, HEAD_DIM)}, ValueError, "balance has a value of 0.0"),
    ],
)
def test_constructor_refuses(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize("head_dim", [8, 24, 40, 288])
def test_head_dims_without_a_format_are_refused(head_dim):
    with pytest.raises(NotImplementedError, match=f"head_dim is {head_dim}, must be a multiple"):
        PagedCache(1, 1, head_dim, torch.float32)


def test_dtype_and_batch_are_checked():
    with pytest.raises(TypeError, match=r"dtype is torch\.int8"):
        PagedCache(1, 1, 64, torch.int8)
    with pytest.raises(ValueError, match="batch is 0"):
        PagedCache(0, 1, 64, torch.float32)
    cache = make(batch=3)
    with pytest.raises(ValueError, match="4 tokens are not a multiple of 3 sequences"):
        cache.append(rows(4), rows(4))
    with pytest.raises(ValueError, match="query_start has 2 entries, must have 4"):
        cache.append(rows(4), rows(4), query_start=[0, 4])
    with pytest.raises(TypeError, match=r"k has dtype torch\.int64"):
        cache.append(rows(3).long(), rows(3))


def test_a_refused_append_leaves_the_cache_as_it_was():
    cache = make()
    cache.append(rows(60), rows(60))
    before = cache.dequantize()
    bad = rows(60).clone()
    bad[59, 1, 3] = float("nan")
    with pytest.raises(ValueError, match=r"v\[token 59, head 1, channel 3\] is nan"):
        cache.append(rows(60), bad)
    assert cache.lengths == [60]
    for a, b in zip(cache.dequantize(), before, strict=True):
        assert torch.equal(a, b)
    cache.append(rows(60, seed=9), rows(60, seed=10))
    assert cache.dequantize()[0].isfinite().all()


@pytest.mark.parametrize("index", [-1, 2])
def test_select_checks_its_indices(index):
    cache = make(batch=2)
    with pytest.raises(IndexError, match=f"index is {index}, must be 0 to 1"):
        cache.select([index])
    with pytest.raises(ValueError, match="indices is empty"):
        cache.select([])
