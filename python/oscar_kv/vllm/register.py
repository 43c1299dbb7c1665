# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: makes the dtypes and backends known to vLLM.

vLLM calls it in the API process, the engine and every worker, perhaps several times.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..serving.layout import DTYPES

CUDA_BACKEND = "OSCAR_KV"
TESTED = ("0.33",)  # releases of vLLM whose plugin interface this follows

_logger = logging.getLogger("vllm.oscar_kv")


def register() -> None:
    """Registers the KV-cache dtypes and backends; says in the log why it could not."""
    try:
        _register()
    except Exception as error:  # an exception here would end vLLM for users of other dtypes, too
        _logger.error("oscar-kv is not available in this vLLM: %s", error)


def _register() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    _check_release()
    for name in DTYPES:
        _register_dtype(name)
    if current_platform.is_cpu():
        # The CPU platform has one backend; ours hands everything that is not packed to vLLM's.
        register_backend(AttentionBackendEnum.CPU_ATTN, "oscar_kv.vllm.cpu.OscarCPUBackend")
    else:
        cuda_backend()


def cuda_backend() -> Any:
    """OSCAR_KV, a member of vLLM's enumeration of backends, which it becomes at the first call."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if CUDA_BACKEND not in AttentionBackendEnum.__members__:
        register_backend(CUDA_BACKEND, "oscar_kv.vllm.cuda.OscarBackend")
        # vLLM sends its configuration to processes that it spawns, and they read it before they
        # load plugins: the member has to bring itself along.
        AttentionBackendEnum[CUDA_BACKEND].__reduce_ex__ = lambda protocol: (cuda_backend, ())
    return AttentionBackendEnum[CUDA_BACKEND]


def _check_release() -> None:
    from vllm.version import __version__ as found

    if not found.startswith(tuple(release + "." for release in TESTED)):
        raise RuntimeError(
            f"vllm is {found}, this release of oscar-kv works with {', '.join(TESTED)}"
        )


def _register_dtype(dtype_name: str) -> None:
    from vllm.config.cache import get_kv_cache_dtype_handler, register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    if get_kv_cache_dtype_handler(dtype_name) is not None:
        return

    class Handler:
        name = dtype_name

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.CUSTOM

    register_kv_cache_dtype(dtype_name)(Handler)
