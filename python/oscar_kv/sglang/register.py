# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Entry point ``sglang.srt.plugins``: makes the attention backends known to SGLang.

SGLang calls it once in each of its processes, before it reads its arguments. The format of the
cache is chosen by the name of the attention backend: SGLang has no list of KV-cache dtypes that a
plugin could add to.
"""

from __future__ import annotations

import logging
from typing import Any

from ..serving.layout import DTYPES, format_of

TESTED = ("0.5.23",)  # releases of SGLang whose interfaces this follows
BACKENDS = DTYPES  # oscar_k2v2 and so on

_POOL = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_SIZES = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
_logger = logging.getLogger("sglang.oscar_kv")


def register() -> None:
    """Registers backends and hooks; says in the log why it could not."""
    from sglang.version import __version__ as found

    if found not in TESTED:
        # An exception would only be logged with a trace; all other backends work as ever.
        _logger.error(
            "oscar-kv is not available in this SGLang: it is %s, this release of oscar-kv works "
            "with %s",
            found,
            ", ".join(TESTED),
        )
        return
    _register_backends()
    _register_hooks()


def _register_backends() -> None:
    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    for name in BACKENDS:
        if name not in ATTENTION_BACKEND_CHOICES:
            add_attention_backend_choices([name])
        register_attention_backend(name)(_factory(name))


def _factory(name: str) -> Any:
    def create(runner: Any) -> Any:
        from .backend import OscarAttnBackend

        format = format_of(name)
        assert format is not None
        return OscarAttnBackend(runner, format)

    return create


def _register_hooks() -> None:
    """On the making of the pool; each hook leaves every other backend as it is."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import hooks

    HookRegistry.register(f"{_POOL}.configure", hooks.check, HookType.BEFORE)
    HookRegistry.register(f"{_POOL}.resolve_max_num_reqs", hooks.requests, HookType.AROUND)
    HookRegistry.register(f"{_POOL}._build_mha_kv_pool", hooks.build_pool, HookType.AROUND)
    HookRegistry.register(f"{_SIZES}._compute_cell_size", hooks.token_bytes, HookType.AROUND)
    HookRegistry.register(f"{_SIZES}.calculate_pool_sizes", hooks.pool_sizes, HookType.AROUND)
