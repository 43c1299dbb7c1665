# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The backend under schedules that SGLang makes: ragged batches, chunks, hits, rows used again."""

import pytest
import torch
from oscar_kv.balance import Balance
from oscar_kv.measured import Rank
from oscar_kv.sglang.backend import OscarAttnBackend
from oscar_kv.sglang.pool import PoolShape
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang_harness import FIRST_LAYER, FakeRunner

# As in tests/vllm/test_layer.py: bfloat16 outputs of normal numbers. A row read from the wrong
# place is off by 0.1 and more.
TOLERANCE = 0.02
SHAPE = (6, 3, 64)


def check(outputs, expected):
    for out, wanted in zip(outputs, expected, strict=True):
        assert torch.isfinite(out).all()
        assert (out - wanted).abs().max() <= TOLERANCE


def text(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return [int(x) for x in torch.randint(0, 1000, (length,), generator=generator)]


@pytest.mark.parametrize("format", ["k2v2", "k4v2", "k4v4"])
@pytest.mark.parametrize("page", [32, 128, 256])
def test_formats_and_page_sizes(monkeypatch, format, page):
    fake = FakeRunner(monkeypatch, SHAPE, format, page, num_pages=2048 // page)
    a, b = fake.add(text(1, 500)), fake.add(text(2, 300))
    for counts in [(200, 1), (1, 100), (130, 31), (1, 1)]:
        check(*fake.step([a, b], list(counts)))


@pytest.mark.parametrize("shape", [(4, 4, 128), (16, 1, 256), (8, 2, 32), (2, 2, 96)])
def test_shapes_and_soft_cap(monkeypatch, shape):
    fake = FakeRunner(monkeypatch, shape, softcap=5.0)
    request = fake.add(text(3, 400))
    for count in (140, 1, 1, 60):
        check(*fake.step([request], [count]))


def test_chunks_that_end_anywhere(monkeypatch):
    fake = FakeRunner(monkeypatch, SHAPE)
    request = fake.add(text(4, 600))
    for count in (128, 128, 1, 127, 33, 1, 70):
        check(*fake.step([request], [count]))


def test_a_mixed_batch_carries_decoding_rows_along(monkeypatch):
    fake = FakeRunner(monkeypatch, SHAPE)
    old, new = fake.add(text(5, 400)), fake.add(text(6, 400))
    check(*fake.step([old], [100]))
    check(*fake.step([new, old], [90, 1], ForwardMode.MIXED))
    check(*fake.step([new, old], [64, 1], ForwardMode.MIXED))
    check(*fake.step([old, new], [1, 1]))


def test_a_prefix_hit_reads_shared_pages_and_leaves_them_alone(monkeypatch):
    fake = FakeRunner(monkeypatch, SHAPE)
    prompt = text(7, 300)
    first = fake.add(prompt)
    check(*fake.step([first], [300]))
    second = fake.add([*prompt[:290], *text(8, 110)])  # while the first is still there
    third = fake.add(text(9, 200))
    assert (second.done, third.done) == (256, 0)
    shared = fake.pages[second.pages].clone()
    check(*fake.step([second, third], [20, 40]))
    for _ in range(50):
        check(*fake.step([third, second], [1, 1]))
    check(*fake.step([second, first], [30, 1], ForwardMode.MIXED))
    assert torch.equal(fake.pages[second.pages[:2]], shared)


def test_a_row_that_is_handed_out_again(monkeypatch):
    """The next owner of a row finds the last one's copies, standing where it starts itself."""
    fake = FakeRunner(monkeypatch, SHAPE, rows=1)
    prompt = text(10, 300)
    first = fake.add(prompt)
    check(*fake.step([first], [256]))
    fake.finish(first)
    second = fake.add([*prompt[:256], *text(11, 60)])
    assert second.row == first.row and second.done == 256
    for count in (1, 20, 1, 30):
        check(*fake.step([second], [count], ForwardMode.EXTEND))
    fake.finish(second)
    cold = fake.add(text(12, 100))
    for count in (70, 1):
        check(*fake.step([cold], [count]))


def test_a_retracted_request_starts_again(monkeypatch):
    fake = FakeRunner(monkeypatch, SHAPE)
    request = fake.add(text(13, 400))
    check(*fake.step([request], [200]))
    check(*fake.step([request], [1]))
    fake.finish(request)
    again = fake.add(request.tokens)
    assert again.done == 128
    check(*fake.step([again], [73]))
    check(*fake.step([again], [1]))


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules(monkeypatch, seed):
    fake = FakeRunner(monkeypatch, SHAPE, page=[32, 64, 128][seed % 3], num_pages=60, seed=seed)
    pick = fake.random
    prompts = [text(100 + i, 420) for i in range(3)]
    for _ in range(50):
        if fake.free_rows and len(fake.running) < 4 and len(fake.free_pages) > 20:
            shared = pick.choice(prompts)[: pick.choice([0, 100, 256, 300, 384])]
            fake.add([*shared, *text(pick.randrange(10**6), 420 - len(shared))])
        batch = [r for r in fake.running if pick.random() < 0.8 and r.done < len(r.tokens)]
        pick.shuffle(batch)
        counts = []
        for request in batch:
            wanted = pick.choice([1, 1, 5, 32, 128 - request.done % 128, 90])
            counts.append(min(wanted, len(request.tokens) - request.done))
        if pick.random() < 0.4:
            batch = [r for r in batch if fake.backend.slots.knows(r.row)]
            counts = [1] * len(batch)
        if batch and fake.room(batch, counts):
            check(*fake.step(batch, counts))
        for request in list(fake.running):
            ended = request.done == len(request.tokens)
            if ended or pick.random() < 0.08:
                fake.finish(request)
                if not ended and pick.random() < 0.5 and fake.free_rows:
                    fake.add(request.tokens)
    assert fake.hits > 2


def test_arrays_keep_their_address_and_padded_rows_hurt_nobody(monkeypatch):
    """As CUDA graphs need it: padded rows are row 0 at their first token."""
    fake = FakeRunner(monkeypatch, SHAPE)
    fake.backend.init_cuda_graph_state(16, 16)
    request = fake.add(text(14, 300))
    check(*fake.step([request], [100]))
    seen = set()
    for _ in range(40):
        batch = fake.batch([request], [1], ForwardMode.DECODE)
        fill = fake.backend.get_cuda_graph_seq_len_fill_value()
        batch.req_pool_indices = torch.tensor([request.row, 0, 0])
        batch.seq_lens = torch.tensor([request.done + 1, fill, fill])
        fake.backend.init_forward_metadata(batch)
        step = fake.backend._step
        tensors = (step.query_start, step.slot, step.context, step.exact_from, step.table)
        seen.add(tuple(x.data_ptr() for x in tensors))
        rows = request.oracle.rows(request.done, request.done + 1)
        q, k, v = (torch.cat([x, torch.randn(2, *x.shape[1:]).bfloat16()]) for x in rows)
        out = fake.backend.forward(q.flatten(1), k, v, fake.layer, batch)
        check([out[:1].view(1, *SHAPE[::2])], [request.oracle.step(*rows)])
        request.done += 1
    assert len(seen) == 1


def test_a_request_that_goes_back_is_an_error(monkeypatch):
    fake = FakeRunner(monkeypatch, SHAPE)
    request = fake.add(text(15, 300))
    fake.step([request], [100])
    request.done -= 10
    with pytest.raises(RuntimeError, match="does not go on where its exact copies end"):
        fake.step([request], [1])


def test_balance_of_a_file(monkeypatch, tmp_path):
    """The oracle's cache has the same factors; with others its output is another."""
    _, kv_heads, head_dim = SHAPE
    factors = torch.rand(kv_heads, head_dim, generator=torch.Generator().manual_seed(0)) + 0.5
    file = tmp_path / "balance.safetensors"
    Balance("llama", FIRST_LAYER + 1, kv_heads, head_dim, {FIRST_LAYER: factors}).save(file)
    monkeypatch.setenv("OSCAR_KV_BALANCE", str(file))
    monkeypatch.setattr(Balance, "check", lambda self, config: None)
    fake = FakeRunner(monkeypatch, SHAPE)
    request = fake.add(text(16, 300))
    request.oracle.cache.balance = factors
    for count in (200, 1, 1):
        check(*fake.step([request], [count]))
    assert torch.equal(fake.backend._of_layer(FIRST_LAYER).balance, factors)
    hit = fake.add([*request.tokens[:128], *text(17, 50)])
    fake.step([hit], [1], ForwardMode.EXTEND)
    exact = fake.token_to_kv_pool.exact[0]
    copied, packed = exact[request.row, 0, :, -4:], exact[hit.row, 0, :, -4:]
    assert (copied - packed).abs().mean() < 0.5 * copied.abs().mean()


@pytest.mark.parametrize(
    ("total", "rank", "ranks", "wanted"),
    [(8, 1, 2, slice(4, 8)), (3, 2, 3, slice(2, 3)), (2, 3, 4, slice(1, 2))],
)
def test_heads_of_a_rank(total, rank, ranks, wanted):
    assert Rank(max(total // ranks, 1), rank, ranks).heads(total) == wanted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window_size": 128}, "sliding_window_size is 128"),
        ({"is_cross_attention": True}, "cross-attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attn_type is encoder_only"),
        ({"use_irope": True}, "chunks"),
        ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode is ALIBI"),
        ({"xai_temperature_len": 1024}, "position"),
        ({"num_heads": 17, "num_kv_heads": 1}, "17 query heads on 1 KV heads"),
        ({"logit_cap": 30.0, "logit_capping_method": "clip"}, "logit_capping_method is clip"),
    ],
)
def test_layers_refused(monkeypatch, changes, reason):
    fake = FakeRunner(monkeypatch, SHAPE)
    given = {"num_heads": 6, "head_dim": 64, "scaling": 0.125, "num_kv_heads": 3, "layer_id": 3}
    arguments = {k: v for k, v in changes.items() if k != "xai_temperature_len"}
    layer = RadixAttention(**{**given, **arguments})
    for name, value in changes.items():
        if name not in given:
            setattr(layer, name, value)
    fake.model = torch.nn.ModuleDict({"odd": layer})
    with pytest.raises(NotImplementedError, match=f"layer odd .*{reason}"):
        OscarAttnBackend(fake, "k2v2")


def test_calls_refused(monkeypatch):
    fake = FakeRunner(monkeypatch, SHAPE)
    request = fake.add(text(18, 100))
    q, k, v = request.oracle.rows(0, 1)
    batch = fake.batch([request], [1], ForwardMode.EXTEND)
    fake.backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match="must own one"):
        fake.backend.forward(q, None, None, fake.layer, batch)
    with pytest.raises(NotImplementedError, match=r"\['sinks'\]"):
        fake.backend.forward(q, k, v, fake.layer, batch, sinks=torch.zeros(6))
    with pytest.raises(NotImplementedError, match="not supported"):
        fake.backend.init_forward_metadata(fake.batch([request], [1], ForwardMode.TARGET_VERIFY))
    with pytest.raises(NotImplementedError, match="by token"):
        fake.token_to_kv_pool.get_key_buffer(FIRST_LAYER)


def test_bytes_of_a_pool():
    shape = PoolShape("k2v2", 2, 3, 64, 128, torch.bfloat16)
    assert shape.token_bytes * 128 == 2 * torch.Size(shape.page).numel()
    assert shape.exact_bytes(5) == 5 * 2 * 2 * 3 * 68 * 64 * 2
