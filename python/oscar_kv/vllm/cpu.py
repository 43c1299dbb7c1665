# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The CPU backend. It replaces vLLM's only one, and hands back to it all that is not packed."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from ..serving.layout import DTYPES, format_of
from .attention import OscarImpl
from .metadata import OscarMetadataBuilder
from .pages import PackedPages


class OscarCPUBackend(CPUAttentionBackend):  # type: ignore[misc]
    """What vLLM selects on a CPU; a packed layer then gets the subclass of its format."""

    supported_kv_cache_dtypes = (*CPUAttentionBackend.supported_kv_cache_dtypes, *DTYPES)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """Ours, and what vLLM's backend takes."""
        return format_of(kv_cache_dtype) is not None or bool(
            super().supports_kv_cache_dtype(kv_cache_dtype)
        )

    @staticmethod
    def get_impl_cls() -> Any:
        """A class that looks at the layer's dtype."""
        return _EitherImpl


class OscarCPUImpl(OscarImpl):
    """Packed attention on the CPU."""

    def backend(self) -> Any:
        """The backend class of this format."""
        return PACKED[self.format]


class _EitherImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """vLLM's implementation, or ours where the layer's dtype is packed."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        dtype = kwargs.get("kv_cache_dtype", args[6] if len(args) > 6 else "auto")
        if format_of(dtype) is not None:
            return OscarCPUImpl(*args, **kwargs)
        return super().__new__(cls)


class PackedCPUBackend(PackedPages, OscarCPUBackend):
    """Pages of one format."""

    @staticmethod
    def get_impl_cls() -> Any:
        """Ours."""
        return OscarCPUImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """Ours."""
        return OscarMetadataBuilder


class K2V2CPUBackend(PackedCPUBackend):
    """2-bit K and V."""

    format = "k2v2"


class K4V2CPUBackend(PackedCPUBackend):
    """4-bit K, 2-bit V."""

    format = "k4v2"


class K4V4CPUBackend(PackedCPUBackend):
    """4-bit K and V."""

    format = "k4v4"


PACKED = {x.format: x for x in (K2V2CPUBackend, K4V2CPUBackend, K4V4CPUBackend)}
