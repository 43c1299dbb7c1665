# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The layer under schedules that vLLM makes: ragged batches, chunks, hits, preemption, reuse."""

import oscar_kv
import pytest
import torch
from harness import FakeEngine
from oscar_kv.vllm.cpu import OscarCPUImpl
from oscar_kv.vllm.metadata import OscarMetadataBuilder

IMPLS = [OscarCPUImpl]
if oscar_kv.cuda_available():
    from oscar_kv.vllm.cuda import OscarCudaImpl

    IMPLS.append(OscarCudaImpl)

# Outputs are averages of normal numbers, stored as bfloat16; the query is rounded to int8 alike in
# both, only sums are in another order. A row read from the wrong place is off by 0.1 and more.
TOLERANCE = 0.02
SHAPE = (6, 3, 64)


@pytest.fixture(autouse=True)
def oracle_in_floats(request):
    """A CUDA device does not round queries to int8: nor does the oracle then."""
    on_cpu = getattr(request.node, "callspec", None) and (
        request.node.callspec.params.get("impl") is OscarCPUImpl
    )
    oscar_kv.set_backend("auto" if on_cpu else "scalar")
    yield
    oscar_kv.set_backend("auto")


def engine(monkeypatch, impl, dtype="oscar_k2v2", block_tokens=128, blocks=40, shape=SHAPE, seed=0):
    return FakeEngine(monkeypatch, impl, shape, dtype, block_tokens, blocks, seed)


def check(outputs, expected):
    for out, wanted in zip(outputs, expected, strict=True):
        assert torch.isfinite(out).all()
        assert (out - wanted).abs().max() <= TOLERANCE


def text(seed, length):
    return [int(x) for x in torch.randint(0, 1000, (length,), generator=_generator(seed))]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block_tokens", [128, 256, 512])
@pytest.mark.parametrize("dtype", ["oscar_k2v2", "oscar_k4v2", "oscar_k4v4"])
def test_formats_and_block_sizes(monkeypatch, impl, dtype, block_tokens):
    fake = engine(monkeypatch, impl, dtype, block_tokens, blocks=24)
    a, b = fake.add(text(1, 700)), fake.add(text(2, 300))
    for counts in [(200, 1), (1, 100), (130, 31), (1, 1)]:
        check(*fake.step([a, b], list(counts)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(4, 4, 128), (16, 1, 256), (8, 2, 32), (2, 2, 96)])
def test_shapes(monkeypatch, impl, shape):
    fake = engine(monkeypatch, impl, shape=shape)
    request = fake.add(text(3, 400))
    for count in (140, 1, 1, 60):
        check(*fake.step([request], [count]))


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_prefix_hit_is_filled_again_and_leaves_shared_pages_alone(monkeypatch, impl, sees):
    monkeypatch.setattr(OscarMetadataBuilder, "_host_sees_device", sees)
    fake = engine(monkeypatch, impl)
    prompt = text(4, 300)
    first = fake.add(prompt)
    check(*fake.step([first], [300]))
    fake.finish(first)
    second = fake.add([*prompt[:290], *text(5, 40)])
    assert (second.hit, second.done) == (256, 192)
    shared = fake.pool[second.blocks].clone()
    # In pieces that end within the replayed tokens, at a tile's end too.
    for count in (20, 12, 1, 33, 1, 30, 1):
        check(*fake.step([second], [count]))
    assert torch.equal(fake.pool[second.blocks[:2]], shared)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_request_that_goes_on_from_a_block_boundary_keeps_its_ring(monkeypatch, impl):
    fake = engine(monkeypatch, impl)
    request = fake.add(text(6, 600))
    for count in (128, 128, 1, 127, 1):
        check(*fake.step([request], [count]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_hit_on_blocks_that_the_previous_owner_left_at_the_same_position(monkeypatch, impl):
    fake = engine(monkeypatch, impl, blocks=8)
    prompt = text(7, 300)
    first = fake.add(prompt)
    check(*fake.step([first], [192]))
    check(*fake.step([first], [64]))
    fake.finish(first)
    # A page of another request in between: the ring's stamps are older than its bytes.
    other = fake.add(text(8, 200))
    check(*fake.step([other], [150]))
    fake.finish(other)
    second = fake.add(prompt)
    check(*fake.step([second], [1]))
    check(*fake.step([second], [40]))


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_hit_on_pages_that_another_request_packs_in_the_same_step(monkeypatch, impl, sees):
    monkeypatch.setattr(OscarMetadataBuilder, "_host_sees_device", sees)
    fake = engine(monkeypatch, impl)
    prompt = text(12, 400)
    first = fake.add(prompt)
    fake.schedule(first, 300)
    second = fake.add([*prompt[:290], *text(13, 100)])
    assert (second.hit, second.done) == (256, 192)
    check(*fake.step([second, first], [100, 300]))
    check(*fake.step([second, first], [1, 1]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("seed", range(6))
def test_random_schedules(monkeypatch, impl, seed):
    monkeypatch.setattr(OscarMetadataBuilder, "_host_sees_device", seed % 2 == 0)
    fake = engine(monkeypatch, impl, blocks=34, seed=seed)
    fake.runner = 1 + seed // 2 % 2
    pick = fake.random
    prompts = [text(100 + i, 520) for i in range(3)]
    for _ in range(60):
        if len(fake.running) < 4 and len(fake.free) > 12:
            shared = pick.choice(prompts)[: pick.choice([0, 100, 256, 300, 384, 500])]
            fake.add([*shared, *text(pick.randrange(10**6), 520 - len(shared))])
        batch = [r for r in fake.running if pick.random() < 0.8 and r.done < len(r.tokens)]
        pick.shuffle(batch)
        counts = []
        for request in batch:
            wanted = pick.choice([1, 1, 5, 32, 128 - request.done % 128, 90])
            counts.append(min(wanted, len(request.tokens) - request.done))
        if batch and fake.room(batch, counts):
            for request, count in zip(list(batch), list(counts), strict=True):
                fake.schedule(request, count)
                if len(fake.running) < 6 and len(fake.free) > 14 and pick.random() < 0.3:
                    other = text(pick.randrange(10**6), 120)
                    batch.append(fake.add([*request.tokens[:400], *other]))
                    counts.append(pick.randint(1, 60))
            check(*fake.step(batch, counts))
        for request in list(fake.running):
            # Finished, cancelled, or preempted and started again from the cached prefix.
            ended = request.done == len(request.tokens)
            if ended or pick.random() < 0.08:
                fake.finish(request)
                if not ended and pick.random() < 0.5:
                    fake.add(request.tokens)
    assert fake.hits > 2


@pytest.mark.skipif(not oscar_kv.cuda_available(), reason="needs a CUDA device")
def test_cuda_graph_of_a_decode_step(monkeypatch):
    """One captured forward pass; what changes from step to step are the builder's tensors."""
    fake = engine(monkeypatch, IMPLS[-1])
    requests = [fake.add(text(20, 400)), fake.add(text(21, 400))]
    check(*fake.step(requests, [120, 200]))
    check(*fake.step(requests, [1, 1]))
    graph = fake.capture(requests)
    for _ in range(80):  # over tile and page boundaries
        check(*fake.step(requests, [1, 1], graph))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_host_alone_knows_which_rows_may_start_with_a_hit(monkeypatch, impl):
    fake = engine(monkeypatch, impl)
    prompt = text(9, 400)
    first = fake.add(prompt)
    check(*fake.step([first], [300]))
    hit, cold = fake.add([*prompt[:290], *text(10, 100)]), fake.add(text(11, 300))
    check(*fake.step([hit, cold, first], [1, 64, 1]))
    assert fake.starting == [True, False, False]
    check(*fake.step([hit, cold, first], [1, 1, 1]))  # cold stands at 64, as after a hit
    assert fake.starting == [False, False, False]
    check(*fake.step([hit, cold], [62, 64]))
    check(*fake.step([hit, cold], [1, 1]))  # and now at a block's end
    assert fake.starting == [False, False]


@pytest.mark.parametrize("runner", [1, 2])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_second_runner_knows_that_a_decoding_row_does_not_start(monkeypatch, impl, runner):
    fake = engine(monkeypatch, impl)
    fake.runner = runner
    a, b = fake.add(text(14, 200)), fake.add(text(15, 200))
    a.prompt = b.prompt = 100
    check(*fake.step([a, b], [128, 60]))
    check(*fake.step([b, a], [1, 1]))  # a stands at a block's end, in another row than before
    assert fake.starting == [False, runner == 1]
