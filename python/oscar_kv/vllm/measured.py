# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Balance factors and error feedback of the layers: from a file of `oscar calibrate`.

``--additional-config '{"oscar_kv": {"balance": "FILE"}}'``; without it all factors are 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..balance import Balance
from .spec import Geometry

_OPTIONS = ("balance",)


@dataclass
class Measured:
    """What is fixed for one layer before its first tile is packed.

    balance float32 [kv_heads, head_dim], feedback float16 [kv_heads, head_dim, head_dim], of this
    rank's KV heads, or None.
    """

    balance: Tensor | None = None
    feedback: Tensor | None = None

    @classmethod
    def of_layer(cls, vllm_config: Any, layer_name: str, geometry: Geometry) -> Measured:
        """ValueError for unknown options and for a file of another model."""
        options = dict((vllm_config.additional_config or {}).get("oscar_kv", {}))
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"oscar-kv: unknown options {unknown}, known are {list(_OPTIONS)}")
        path = options.get("balance")
        if path is None:
            return cls()
        from vllm.model_executor.models.utils import extract_layer_index

        whole = _load(str(path))
        whole.check(vllm_config.model_config.hf_config)
        layer = extract_layer_index(layer_name)
        heads = _local_heads(whole.kv_heads, geometry.kv_heads)
        device = torch.device(vllm_config.device_config.device_type)
        balance, feedback = whole.factors.get(layer), whole.feedback.get(layer)
        return cls(
            None if balance is None else balance[heads].float().contiguous().to(device),
            None if feedback is None else feedback[heads].contiguous().to(device),
        )


@functools.lru_cache(maxsize=1)
def _load(path: str) -> Balance:
    return Balance.load(path)


def _local_heads(kv_heads: int, local: int) -> slice:
    """This rank's KV heads under tensor parallelism; with more ranks than heads they repeat."""
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    first = rank * local if kv_heads >= ranks else rank * kv_heads // ranks
    return slice(first, first + local)
