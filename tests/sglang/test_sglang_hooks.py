# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Registration and the hooks, in SGLang's own registry and on its own classes."""

import logging
from types import SimpleNamespace

import pytest
import torch
from oscar_kv.sglang import hooks, register
from oscar_kv.sglang.pool import OscarPool, PoolShape
from sglang.srt import runtime_context
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

NAMES = ["oscar_k2v2", "oscar_k4v2", "oscar_k4v4"]
SHAPE = PoolShape("k2v2", 2, 3, 64, 128, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    HookRegistry.apply_hooks()
    yield
    HookRegistry.reset()


@pytest.fixture
def chosen(monkeypatch):
    """Says which backends were asked for, and for how many requests."""

    def choose(prefill, decode=None, requests=None):
        pair = (prefill, decode or prefill)
        monkeypatch.setattr(runtime_context, "attention_backends", lambda: pair)
        schedule = SimpleNamespace(max_running_requests=requests)
        monkeypatch.setattr(runtime_context, "get_schedule", lambda: schedule)
        parallel = SimpleNamespace(attn_tp_size=1, attn_dcp_size=1)
        monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
        features = SimpleNamespace(enable_memory_saver=False)
        graphs = SimpleNamespace(prefill=SimpleNamespace(backend="breakable"))
        execution = SimpleNamespace(
            features=features, graph=SimpleNamespace(cuda_graph_config=graphs)
        )
        monkeypatch.setattr(runtime_context, "get_exec", lambda: execution)

    return choose


def configurator(**changes):
    """A KVCacheConfigurator of a small model, without a model."""
    kvc = object.__new__(KVCacheConfigurator)
    model = SimpleNamespace(
        head_dim=64, v_head_dim=64, is_encoder_decoder=False, get_num_kv_heads=lambda tp, dcp: 3
    )
    attributes = {
        "is_draft_worker": False,
        "model_config": model,
        "model_dtype": torch.bfloat16,
        "layer_info": SimpleNamespace(num_effective_layers=2, start_layer=0, end_layer=2),
        "attn_dp_size": 1,
        "device": "cpu",
        "server_args": ServerArgs(model_path="none"),
        "post_capture_kv_active": False,
        "spec_algorithm": SimpleNamespace(is_none=lambda: True),
        "use_mla_backend": False,
        "is_hybrid_swa": False,
        "mambaish_config": None,
        "pool_page_size": 128,
    }
    for name, value in {**attributes, **changes}.items():
        if name == "pool_page_size":
            continue
        object.__setattr__(kvc, name, value)
    return kvc


@pytest.fixture
def paged(monkeypatch):
    """The page size, which SGLang derives from published arguments."""

    def page(tokens):
        monkeypatch.setattr(KVCacheConfigurator, "pool_page_size", property(lambda self: tokens))

    page(128)
    return page


def test_backends_are_known_by_name_once():
    register()
    assert [name for name in ATTENTION_BACKEND_CHOICES if name.startswith("oscar")] == NAMES
    assert set(NAMES) <= set(ATTENTION_BACKENDS)


def test_an_unknown_release_is_named_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr("sglang.version.__version__", "0.9.1")
    logger = logging.getLogger("sglang.oscar_kv")
    logger.addHandler(caplog.handler)
    register()
    logger.removeHandler(caplog.handler)
    assert "0.9.1" in caplog.text and "0.5.23" in caplog.text


def test_bytes_of_a_token_and_what_the_exact_copies_take(chosen, paged):
    chosen("oscar_k2v2", requests=10)
    sizes = object.__new__(DefaultPoolConfigurator)
    sizes._fixed_overhead_bytes = 0
    sizes._cell_size = sizes._compute_cell_size(configurator(), 2)
    assert sizes._cell_size == SHAPE.token_bytes
    exact, tokens = SHAPE.exact_bytes(11), 128 * 50
    config = sizes.calculate_pool_sizes(exact + tokens * SHAPE.token_bytes + 5, 128)
    assert config.max_total_num_tokens == tokens
    with pytest.raises(ValueError, match=f"take {exact} bytes, 1000 are free.*max-running"):
        sizes.calculate_pool_sizes(1000, 128)


def test_other_backends_are_left_alone(chosen):
    chosen("torch_native")
    seen = []
    assert (
        hooks.token_bytes(lambda *given: seen.append(given) or 7, "sizes", configurator(), 2) == 7
    )
    assert hooks.pool_sizes(lambda *given: given, SimpleNamespace(), 100, 128)[1:] == (100, 128)
    assert hooks.requests(lambda *given: 4096, configurator(), 5) == 4096
    assert hooks.build_pool(lambda kvc, **given: given, configurator(), a=1) == {"a": 1}
    assert hooks.check(configurator()) is None


def test_requests_are_as_many_as_have_exact_memory(chosen):
    chosen("oscar_k2v2")
    assert hooks.requests(lambda *given: 4096, configurator(), 5) == hooks.DEFAULT_REQUESTS
    chosen("oscar_k2v2", requests=12)
    assert hooks.requests(lambda *given: 4096, configurator(), 5) == 12
    assert hooks.requests(lambda *given: 3, configurator(), 5) == 3


def test_the_pool_that_is_built(chosen, paged):
    chosen("oscar_k4v2")
    pool = configurator()._build_mha_kv_pool(max_total_num_tokens=256, mha_pool_class=object)
    assert isinstance(pool, OscarPool) and pool.shape.format == "k4v2"
    assert [tuple(x.shape) for x in pool.pages] == [(3, *pool.shape.page)] * 2
    assert pool.get_kv_size_bytes() == 3 * 128 * pool.shape.token_bytes


def test_different_backends_for_prefill_and_decode(chosen):
    chosen("oscar_k2v2", "torch_native")
    with pytest.raises(NotImplementedError, match=r"\['oscar_k2v2', 'torch_native'\] differ"):
        hooks.packed_format(configurator())


@pytest.mark.parametrize("page", [1, 16, 48])
def test_page_sizes_refused(chosen, paged, page):
    chosen("oscar_k2v2")
    paged(page)
    with pytest.raises(ValueError, match=f"page_size is {page}, must be a multiple of 32"):
        configurator().configure(pre_model_load_memory=0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("kv_cache_dtype", "fp8_e4m3"),
        ("disaggregation_mode", "prefill"),
        ("enable_hierarchical_cache", True),
        ("enable_streaming_session", True),
        ("enable_two_batch_overlap", True),
        ("dllm_algorithm", "LowConfidence"),
        ("kv_canary", "log"),
        ("dcp_size", 2),
    ],
)
def test_arguments_refused(chosen, paged, argument, value):
    chosen("oscar_k2v2")
    kvc = configurator(server_args=ServerArgs(model_path="none", **{argument: value}))
    with pytest.raises(NotImplementedError, match=f"{argument} is {value}, must be"):
        kvc.configure(pre_model_load_memory=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda"}, "--disable-prefill-cuda-graph"),
        ({"device": "npu"}, "device is npu, must be cpu or cuda"),
        ({"use_mla_backend": True}, "MLA"),
        ({"is_hybrid_swa": True}, "sliding window"),
        ({"mambaish_config": object()}, "state-space"),
        ({"post_capture_kv_active": True}, "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=0"),
        ({"spec_algorithm": SimpleNamespace(is_none=lambda: False)}, "drafts"),
    ],
)
def test_models_refused(chosen, paged, changes, reason):
    chosen("oscar_k2v2")
    with pytest.raises(NotImplementedError, match=reason):
        configurator(**changes).configure(pre_model_load_memory=0)


def test_every_argument_that_is_looked_at_exists():
    from oscar_kv.sglang.refuse import _ARGUMENTS

    default = ServerArgs(model_path="none")
    for name, (allowed, _) in _ARGUMENTS.items():
        value = getattr(default, name)
        assert value == allowed or not (value or allowed), (name, value)
