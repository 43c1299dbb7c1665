# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What the packed cache cannot do in vLLM, refused when the model is built."""

from __future__ import annotations

from typing import Any

from ..serving.layout import token_bytes
from .spec import BLOCK_TOKENS, Geometry

MAX_GQA = 16


def check_engine(vllm_config: Any) -> None:
    """NotImplementedError for an engine setting that the packed cache does not support."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    offloading = getattr(cache, "kv_offloading_size", None)
    decode_ranks = parallel.decode_context_parallel_size
    prefill_ranks = getattr(parallel, "prefill_context_parallel_size", 1)
    skipped = cache.kv_cache_dtype_skip_layers
    model = vllm_config.model_config
    reasons = (
        (
            vllm_config.speculative_config is not None,
            "speculative_config is set: rejected drafts would complete tiles for good",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "kv_transfer_config is set: a KV connector moves pages without the exact copies",
        ),
        (
            offloading is not None,
            f"kv_offloading_size is {offloading}: offloading moves pages without the exact copies",
        ),
        (decode_ranks > 1, f"decode_context_parallel_size is {decode_ranks}, must be 1"),
        (prefill_ranks > 1, f"prefill_context_parallel_size is {prefill_ranks}, must be 1"),
        (
            bool(skipped),
            f"kv_cache_dtype_skip_layers is {skipped}, must be empty: all layers share one page "
            "size",
        ),
        (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is True,
            "disable_hybrid_kv_cache_manager is set: the exact copies need groups of their own",
        ),
        (
            bool(parallel.enable_dbo),
            "enable_dbo is set: exact copies are tracked for one batch at a time",
        ),
        (
            model is not None and bool(model.is_hybrid),
            "the model mixes attention with state-space layers",
        ),
    )
    for refused, reason in reasons:
        if refused:
            raise NotImplementedError(f"oscar-kv: {reason}")


def check_layer(
    format: str,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    *,
    sliding_window: int | None,
    alibi_slopes: object,
    attn_type: str,
    kv_sharing_target: str | None,
    extra: dict[str, Any],
) -> None:
    """NotImplementedError for an attention layer that cannot be packed."""
    token_bytes(head_size, format)
    if sliding_window is not None:
        raise NotImplementedError(
            f"oscar-kv: sliding_window is {sliding_window}: layers with a sliding window cannot "
            "be packed, and all layers share one kind of page"
        )
    if alibi_slopes is not None:
        raise NotImplementedError("oscar-kv: ALiBi slopes are not supported")
    if attn_type != "decoder":
        raise NotImplementedError(f"oscar-kv: attn_type is {attn_type}, must be decoder")
    if kv_sharing_target is not None:
        raise NotImplementedError(
            f"oscar-kv: the layer shares the KV cache of {kv_sharing_target}, it must own one"
        )
    if extra.get("sinks") is not None:
        raise NotImplementedError("oscar-kv: learned sink logits are not supported in vLLM yet")
    given = sorted(name for name, value in extra.items() if value is not None)
    if given:
        raise NotImplementedError(f"oscar-kv: attention arguments {given} are not supported")
    if num_heads // num_kv_heads > MAX_GQA:
        raise NotImplementedError(
            f"oscar-kv: {num_heads} query heads on {num_kv_heads} KV heads, must be at most "
            f"{MAX_GQA} times as many"
        )


def check_block_size(block_tokens: int) -> None:
    """ValueError for a block size whose blocks do not hold whole pages and exact copies."""
    if block_tokens not in BLOCK_TOKENS:
        allowed = ", ".join(str(tokens) for tokens in BLOCK_TOKENS)
        raise ValueError(f"oscar-kv: block_size is {block_tokens}, must be one of {allowed}")


def check_cache(geometry: Geometry, shape: tuple[int, ...], contiguous: bool) -> None:
    """RuntimeError where vLLM's cache tensor is not what the pages need."""
    wanted = (geometry.kv_heads, geometry.block_tokens, geometry.tile_bytes // 32)
    if tuple(shape[1:]) != wanted or not contiguous:
        raise RuntimeError(
            f"oscar-kv: KV cache of shape {list(shape)} (contiguous: {contiguous}), must be "
            f"contiguous [num_blocks, {', '.join(str(x) for x in wanted)}]"
        )
