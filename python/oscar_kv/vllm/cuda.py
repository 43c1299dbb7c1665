# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend: ``--attention-backend OSCAR_KV`` with one of our ``--kv-cache-dtype``."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport

from ..serving.layout import DTYPES
from .attention import OscarImpl
from .metadata import OscarMetadataBuilder
from .pages import PackedPages
from .spec import BLOCK_TOKENS


class OscarBackend(PackedPages, AttentionBackend):  # type: ignore[misc]
    """What vLLM selects by name; a layer then gets the subclass of its format."""

    forward_includes_kv_cache_update = True
    supported_dtypes = (torch.float16, torch.bfloat16)
    supported_kv_cache_dtypes = DTYPES

    @staticmethod
    def get_name() -> str:
        """As registered."""
        return "OSCAR_KV"

    @staticmethod
    def get_impl_cls() -> Any:
        """Of all formats."""
        return OscarCudaImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """Of all groups."""
        return OscarCudaMetadataBuilder

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """Only packed caches."""
        return kv_cache_dtype in DTYPES

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Sizes whose blocks hold the exact copies."""
        return block_size is None or block_size in BLOCK_TOKENS

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Before a layer's format is known there is nothing to change."""
        return super().customize_spec(spec) if cls.format else spec


class OscarCudaImpl(OscarImpl):
    """Packed attention on a CUDA device."""

    def backend(self) -> Any:
        """The backend class of this format."""
        return PACKED[self.format]


class OscarCudaMetadataBuilder(OscarMetadataBuilder):
    """Full CUDA graphs of decode batches: all that a step's kernels read keeps its address."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    _host_sees_device = False


class K2V2Backend(OscarBackend):
    """2-bit K and V."""

    format = "k2v2"


class K4V2Backend(OscarBackend):
    """4-bit K, 2-bit V."""

    format = "k4v2"


class K4V4Backend(OscarBackend):
    """4-bit K and V."""

    format = "k4v4"


PACKED = {x.format: x for x in (K2V2Backend, K4V2Backend, K4V4Backend)}
