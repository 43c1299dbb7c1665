# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What the packed cache cannot do in SGLang, refused before the pool is made."""

from __future__ import annotations

from typing import Any

from ..serving.layout import TILE_TOKENS, token_bytes

MAX_GQA = 16

# Arguments of the server, the value they must have, and why.
_ARGUMENTS = {
    "kv_cache_dtype": ("auto", "the attention backend names the format"),
    "disaggregation_mode": ("null", "pages would move without the exact copies"),
    "enable_hierarchical_cache": (False, "pages would move without the exact copies"),
    "enable_lmcache": (False, "pages would move without the exact copies"),
    "enable_flexkv": (False, "pages would move without the exact copies"),
    "enable_unified_cache_external_linker": (False, "pages would move without the exact copies"),
    "enable_hisparse": (False, "pages would move without the exact copies"),
    "enable_streaming_session": (False, "a session may go back behind the exact copies"),
    "enable_session_radix_cache": (False, "a session may go back behind the exact copies"),
    "enable_unified_memory": (False, "it lays out pools of its own"),
    "enable_page_major_kv_layout": (False, "the packed pool has a layout of its own"),
    "enable_kv_cache_sharding": (False, "exact copies are not sharded by page"),
    "enable_two_batch_overlap": (False, "exact copies are tracked for one batch at a time"),
    "enable_pdmux": (False, "exact copies are tracked for one batch at a time"),
    "prefill_only_disable_kv_cache": (False, "attention reads the packed cache"),
    "dllm_algorithm": (None, "tokens that are drawn again would complete tiles for good"),
    "kv_canary": ("none", "it reads K and V by token"),
    "dcp_size": (1, "a sequence's pages must lie on one rank"),
    "attn_cp_size": (1, "a sequence's pages must lie on one rank"),
}


def check_engine(kvc: Any, format: str) -> None:
    """NotImplementedError or ValueError for a setting that the packed cache does not support."""
    for name, (allowed, reason) in _ARGUMENTS.items():
        value = getattr(kvc.server_args, name)
        if value != allowed and (value or allowed):  # None, False: not set
            raise NotImplementedError(f"oscar-kv: {name} is {value}, must be {allowed}: {reason}")
    page = kvc.pool_page_size
    if page % TILE_TOKENS or page < TILE_TOKENS:
        raise ValueError(
            f"oscar-kv: page_size is {page}, must be a multiple of {TILE_TOKENS}: --page-size 128"
        )
    if kvc.post_capture_kv_active:
        raise NotImplementedError(
            "oscar-kv: the pool would be sized after graph capture: set "
            "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=0"
        )
    if kvc.device not in ("cpu", "cuda"):
        raise NotImplementedError(f"oscar-kv: device is {kvc.device}, must be cpu or cuda")
    if kvc.device == "cuda":
        _check_graphs()
    check_model(kvc, format)


def _check_graphs() -> None:
    from sglang.srt.runtime_context import get_exec

    if get_exec().graph.cuda_graph_config.prefill.backend != "disabled":
        raise NotImplementedError(
            "oscar-kv: CUDA graphs of prefill batches are not supported: "
            "--disable-prefill-cuda-graph"
        )


def check_model(kvc: Any, format: str) -> None:
    """NotImplementedError for a model whose K and V are not those of plain attention."""
    model = kvc.model_config
    reasons = (
        (not kvc.spec_algorithm.is_none(), "rejected drafts would complete tiles for good"),
        (kvc.use_mla_backend, "the model keeps latents (MLA), not K and V"),
        (kvc.is_hybrid_swa, "the model mixes layers with a sliding window with others"),
        (kvc.mambaish_config is not None, "the model mixes attention with state-space layers"),
        (model.is_encoder_decoder, "the model has cross-attention"),
        (
            model.v_head_dim != model.head_dim,
            f"v_head_dim is {model.v_head_dim}, must be head_dim, {model.head_dim}",
        ),
    )
    for refused, reason in reasons:
        if refused:
            raise NotImplementedError(f"oscar-kv: {reason}")
    token_bytes(model.head_dim, format)


def check_layer(layer: Any, name: str) -> None:
    """NotImplementedError for an attention layer that cannot be packed."""
    kind = getattr(layer.attn_type, "value", layer.attn_type)
    group = layer.tp_q_head_num / layer.tp_k_head_num
    reasons = (
        (
            layer.sliding_window_size not in (None, -1),
            f"its sliding_window_size is {layer.sliding_window_size}",
        ),
        (layer.is_cross_attention, "it is cross-attention"),
        (kind != "decoder", f"its attn_type is {kind}, must be decoder"),
        (layer.use_irope, "it attends to chunks of the sequence only"),
        (layer.xai_temperature_len > 0, "it scales queries by their position"),
        (
            layer.pos_encoding_mode != "NONE",
            f"its pos_encoding_mode is {layer.pos_encoding_mode}, must be NONE",
        ),
        (
            layer.logit_cap > 0 and layer.logit_capping_method != "tanh",
            f"its logit_capping_method is {layer.logit_capping_method}, must be tanh",
        ),
        (
            group > MAX_GQA,
            f"it has {layer.tp_q_head_num} query heads on {layer.tp_k_head_num} KV heads, must be "
            f"at most {MAX_GQA} times as many",
        ),
    )
    for refused, reason in reasons:
        if refused:
            raise NotImplementedError(f"oscar-kv: layer {name} cannot be packed: {reason}")
