# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""PagedCache and the ops on a CUDA device: the CPU's bytes and results, late errors, graphs."""

import copy
import pickle

import oscar_kv
import pytest
import torch
from oscar_kv import PagedCache, ops
from oscar_kv.plan import SharedPlans

pytestmark = pytest.mark.skipif(
    not oscar_kv.cuda_available(), reason="no CUDA kernels in this build, or no usable GPU"
)
KV_HEADS, Q_HEADS = 2, 8
MOST_DIFFERENT = 1e-4  # share of packed bytes, where the tensor cores round differently


def rows(tokens, heads=KV_HEADS, head_dim=128, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed + tokens)
    return torch.randn((tokens, heads, head_dim), generator=generator).to(dtype)


def pair(batch=1, head_dim=128, dtype=torch.bfloat16, **options):
    """The same empty cache on the CPU and on the GPU."""
    return [
        PagedCache(batch, KV_HEADS, head_dim, dtype, device=device, **options)
        for device in ("cpu", "cuda")
    ]


def feedback_weights(head_dim=128, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn((KV_HEADS, head_dim, head_dim), generator=generator).triu(1)


def feed(caches, counts, seed=0):
    start = [0]
    for count in counts:
        start.append(start[-1] + count)
    head_dim, dtype = caches[0].head_dim, caches[0].dtype
    k = rows(start[-1], head_dim=head_dim, dtype=dtype, seed=seed)
    v = rows(start[-1], head_dim=head_dim, dtype=dtype, seed=seed + 1)
    for cache in caches:
        cache.append(k.to(cache.device), v.to(cache.device), start)


def assert_same(cpu, gpu):
    assert gpu.lengths == cpu.lengths
    assert gpu.seq_len.tolist() == cpu.lengths
    assert torch.equal(gpu.exact.cpu(), cpu.exact)
    for row, length in enumerate(cpu.lengths):
        for tile in range(length // 32):
            page = tile * 32 // cpu.page_tokens
            within = tile % (cpu.page_tokens // 32)
            a = cpu.pool.storage[cpu.block_table[row, page], :, within]
            b = gpu.pool.storage[gpu.block_table[row, page], :, within].cpu()
            assert int((a != b).sum()) <= MOST_DIFFERENT * a.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("fmt", ["k2v2", "k4v2", "k4v4"])
@pytest.mark.parametrize("fed", [False, True])
def test_bytes_are_those_of_the_cpu(fed, fmt, head_dim, dtype):
    balance = torch.linspace(-2, 2, KV_HEADS * head_dim).exp2().view(KV_HEADS, head_dim)
    caches = pair(3, head_dim, dtype, format=fmt, balance=balance)
    for cache in caches if fed else []:
        cache.feedback = feedback_weights(head_dim)
    for step, counts in enumerate([[100, 0, 31], [1, 1, 1], [40, 200, 5], [1, 1, 1]]):
        feed(caches, counts, seed=10 * step)
    assert_same(*caches)


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_attend_equals_dense_attention_on_the_dequantised_cache(head_dim, dtype, queries):
    _, cache = pair(1, head_dim, dtype)
    # Of a length at which all 40 queries read the same eight tiles packed.
    feed([cache], [287])
    q = rows(queries, Q_HEADS, head_dim, dtype, seed=7)
    k, v = (
        rows(queries, head_dim=head_dim, dtype=dtype, seed=8),
        rows(queries, head_dim=head_dim, dtype=dtype, seed=9),
    )
    out, lse = cache.attend(q.cuda(), k.cuda(), v.cuda(), scale=head_dim**-0.5)
    for i in range(queries):
        # What the query at this position reads is what the CPU's float path reads.
        reference = _one_query(cache, q, k, v, i, head_dim**-0.5)
        difference = (out[i].cpu().double() - reference[0]).norm() / reference[0].norm()
        assert difference <= 2e-2  # of a 16-bit output against exact arithmetic on other copies
        torch.testing.assert_close(lse[i].cpu().double(), reference[1], atol=2e-2, rtol=0)


def _one_query(cache, q, k, v, i, scale):
    """Query i over the cache as the newest query reads it, and rows 0 .. i of the call."""
    keys, values = (x[0].cpu().double().transpose(0, 1) for x in cache.dequantize())
    keys = torch.cat([keys, k[: i + 1].double()]).repeat_interleave(Q_HEADS // KV_HEADS, 1)
    values = torch.cat([values, v[: i + 1].double()]).repeat_interleave(Q_HEADS // KV_HEADS, 1)
    scores = torch.einsum("hd,thd->ht", q[i].double(), keys) * scale
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values), scores.logsumexp(-1)


def test_feedback_changes_the_keys_and_not_the_values():
    _, plain = pair()
    _, fed = pair()
    fed.feedback = feedback_weights()
    assert fed.feedback.device == fed.device
    feed([plain, fed], [320])
    keys, values = (x[..., :288, :] for x in plain.dequantize())
    fed_keys, fed_values = (x[..., :288, :] for x in fed.dequantize())
    assert not torch.equal(keys, fed_keys)
    assert torch.equal(values, fed_values)


def test_crop_and_select_as_on_the_cpu():
    caches = pair(3)
    for cache in caches:
        cache.feedback = feedback_weights()
    feed(caches, [70, 160, 200])
    for cache in caches:
        cache.select([2, 0, 0, 1])
        cache.crop(20)
    feed(caches, [40, 1, 0, 33], seed=5)
    assert_same(*caches)


def test_copies_have_arrays_of_their_own():
    _, cache = pair()
    feed([cache], [100])
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        feed([other], [50])
        assert (other.lengths, cache.lengths) == ([150], [100])
        other.check()


def test_a_nan_is_an_error_of_a_later_call():
    _, cache = pair()
    feed([cache], [40])
    k, v = rows(3).cuda(), rows(3, seed=1).cuda()
    v[2, 1, 5] = float("nan")
    cache.append(k, v)
    with pytest.raises(ValueError, match=r"v\[token 2, head 1\].*reset\(\)"):
        cache.check()
    with pytest.raises(ValueError, match="not finite"):
        cache.append(k, v)
    assert bool(torch.isfinite(cache.exact.float()).all())
    cache.reset()
    feed([cache], [3])
    cache.check()


def test_the_op_says_it_at_its_next_call():
    _, cache = pair()
    feed([cache], [1])
    k = rows(1).cuda()
    start = torch.tensor([0, 1], dtype=torch.int32).cuda()
    *memory, feedback = cache._tensors()
    arguments = [*memory, k * float("inf"), k, start, "k2v2", 32, 4, "both", feedback]
    ops.append(*arguments)
    torch.cuda.synchronize()
    arguments[7] = k
    with pytest.raises(ValueError, match=r"k\[token 0"):
        ops.append(*arguments)
    ops.append(*arguments)


def test_tensors_of_two_devices_are_refused():
    _, cache = pair()
    with pytest.raises(TypeError, match=r"k is on cpu, must be on cuda:0"):
        cache.append(rows(1), rows(1))
    with pytest.raises(TypeError, match="must be on CUDA device 0"):
        cache.attend(rows(1, Q_HEADS).cuda(), rows(1), rows(1), scale=1.0)


def test_rows_that_are_not_aligned_are_copied():
    caches = pair()
    feed(caches, [64])
    wide = torch.zeros(5, KV_HEADS, 129, dtype=torch.bfloat16, device="cuda")
    wide[..., 1:] = rows(5).cuda()
    caches[1].append(wide[..., 1:], wide[..., 1:])
    caches[0].append(rows(5), rows(5))
    assert_same(*caches)


@pytest.mark.parametrize("fed", [False, True])
def test_a_graph_of_a_step_can_be_replayed(fed):
    """Replayed over the end of tiles and pages, with lengths that only the device knows."""
    _, eager = pair(2)
    eager.feedback = feedback_weights() if fed else None
    feed([eager], [120, 40])
    replayed = copy.deepcopy(eager)
    replayed.reserve(300)
    q = rows(2, Q_HEADS, seed=3).cuda()
    k, v = rows(2, seed=4).cuda(), rows(2, seed=5).cuda()

    def step(cache):
        out, _ = cache.attend(q, k, v, scale=0.1)
        cache.append(k, v)
        return out

    step(eager)
    step(replayed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(replayed)
    replayed.replayed(-1)  # capturing ran nothing
    for i in range(100):
        q.normal_(), k.normal_(), v.normal_()
        graph.replay()
        replayed.replayed(1)
        assert torch.equal(captured, step(eager)), f"step {i}"
    assert replayed.lengths == eager.lengths
    assert replayed.seq_len.tolist() == eager.lengths
    for a, b in zip(replayed.dequantize(), eager.dequantize(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_layers_share_a_plan_in_a_replayed_graph(strict):
    """The plan is made anew in every replay, for lengths that only the device knows."""
    _, first = pair(3)
    feed([first], [120, 40, 1000])
    second = copy.deepcopy(first)
    alone = copy.deepcopy(first)
    for cache in (first, second):
        cache.reserve(1200)
    plans = SharedPlans()
    q = rows(3, Q_HEADS, seed=3).cuda()
    k, v = rows(3, seed=4).cuda(), rows(3, seed=5).cuda()

    def step(cache, **given):
        out, _ = cache.attend(q, k, v, scale=0.1, strict=strict, **given)
        cache.append(k, v)
        return out

    def layers():
        return [step(cache, plans=plans) for cache in (first, second)]

    expected = step(alone)
    for out in layers():
        assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    for cache in (first, second):
        cache.replayed(-1)  # capturing ran nothing
    for i in range(80):
        q.normal_(), k.normal_(), v.normal_()
        graph.replay()
        for cache in (first, second):
            cache.replayed(1)
        expected = step(alone)
        for out in captured:
            assert torch.equal(out, expected), f"step {i}"
    torch.cuda.synchronize()
    expected = step(alone)
    for out in layers():  # behind the graph, with a plan of its own
        assert torch.equal(out, expected)


def test_a_plan_of_another_call_is_refused():
    _, cache = pair(2)
    feed([cache], [120, 40])
    q, k = rows(2, Q_HEADS, seed=3).cuda(), rows(2, seed=4).cuda()
    start = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
    layout = (cache.format, cache.window, cache.sinks)
    given = (cache._arrays(), q, k, k, start, *layout, 0.1, 0.0, 0, None, False)
    plan = ops.plan_attend(cache._arrays(), start, 2, Q_HEADS, *layout, max_query_len=1)
    out, _ = ops.attend_over(*given, max_query_len=1, plan=plan)
    assert torch.equal(out, ops.attend_over(*given, max_query_len=1)[0])
    with pytest.raises(ValueError, match="plan was made for max_query_len 1, this call has 2"):
        ops.attend_over(*given, max_query_len=2, plan=plan)
