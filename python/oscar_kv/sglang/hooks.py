# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Hooks on the making of SGLang's KV pool.

Each is called with the function that it wraps (BEFORE: with its arguments only) and passes on
whatever is not for a packed backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..serving.layout import exact_dtype, format_of
from .refuse import check_engine

# Each slot holds exact copies, so SGLang's own default of 2048 and more would be gigabytes.
DEFAULT_REQUESTS = 256

_logger = logging.getLogger("sglang.oscar_kv")


def packed_format(kvc: Any) -> str | None:
    """The format that the attention backend of a `KVCacheConfigurator` asks for, or None."""
    from sglang.srt.runtime_context import attention_backends

    names = set(attention_backends())
    formats = {format_of(name) for name in names}
    if formats == {None} or kvc.is_draft_worker:
        return None
    if len(formats) > 1:
        raise NotImplementedError(
            f"oscar-kv: attention backends {sorted(names)} differ, prefill and decode must share "
            "one: they read the same pages"
        )
    return formats.pop()


def geometry(kvc: Any, format: str) -> Any:
    """Shapes of the pool that this rank would have."""
    from sglang.srt.runtime_context import get_parallel

    from .pool import PoolShape

    parallel, model = get_parallel(), kvc.model_config
    return PoolShape(
        format=format,
        layers=int(kvc.layer_info.num_effective_layers),
        kv_heads=int(model.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size)),
        head_dim=int(model.head_dim),
        page_tokens=int(kvc.pool_page_size),
        exact_dtype=exact_dtype(kvc.model_dtype),
    )


def most_requests(kvc: Any) -> int:
    """Requests of this rank that may run at a time, before the pool's size is known."""
    from sglang.srt.runtime_context import get_schedule

    asked = get_schedule().max_running_requests
    return DEFAULT_REQUESTS if asked is None else max(1, int(asked) // int(kvc.attn_dp_size))


def check(kvc: Any, *args: Any, **kwargs: Any) -> None:
    """Before the pool is made: refuses what the packed cache cannot do."""
    format = packed_format(kvc)
    if format is not None:
        check_engine(kvc, format)


def token_bytes(original: Callable[..., int], sizes: Any, kvc: Any, num_layers: int) -> int:
    """Bytes of a token in all layers."""
    format = packed_format(kvc)
    if format is None:
        return original(sizes, kvc, num_layers)
    shape = geometry(kvc, format)
    sizes.oscar_exact_bytes = shape.exact_bytes(most_requests(kvc) + 1)
    return shape.token_bytes


def pool_sizes(original: Callable[..., Any], sizes: Any, available_bytes: int, *args: Any) -> Any:
    """The pool gets what the exact copies leave."""
    exact = getattr(sizes, "oscar_exact_bytes", 0)
    if exact >= available_bytes:
        raise ValueError(
            f"oscar-kv: the exact copies of all requests take {exact} bytes, {available_bytes} "
            "are free for the cache: lower --max-running-requests"
        )
    return original(sizes, available_bytes - exact, *args)


def requests(original: Callable[..., int], kvc: Any, *args: Any, **kwargs: Any) -> int:
    """At most as many requests as there is exact memory for."""
    found = original(kvc, *args, **kwargs)
    return found if packed_format(kvc) is None else min(found, most_requests(kvc))


def build_pool(original: Callable[..., Any], kvc: Any, **kwargs: Any) -> Any:
    """The packed pool instead of one of 16-bit K and V."""
    format = packed_format(kvc)
    if format is None:
        return original(kvc, **kwargs)
    from sglang.srt.runtime_context import get_exec

    from .pool import OscarPool

    shape = geometry(kvc, format)
    pool = OscarPool(
        shape,
        tokens=int(kwargs["max_total_num_tokens"]),
        device=kvc.device,
        enable_memory_saver=get_exec().features.enable_memory_saver,
        start_layer=kvc.layer_info.start_layer,
        end_layer=kvc.layer_info.end_layer,
    )
    _logger.info("oscar-kv: %s, %d bytes a token in all layers", format, shape.token_bytes)
    return pool
