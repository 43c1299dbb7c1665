# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The calibration of the layers: from a file of `oscar calibrate`.

``--additional-config '{"oscar_kv": {"balance": "FILE"}}'``; "auto" measures one for the model, once
(auto_balance.py); without it nothing is measured.
"""

from __future__ import annotations

from typing import Any

from ..auto_balance import balance_file
from ..calibration import Calibration
from ..measured import Rank, layer_calibration
from .spec import Geometry

_OPTIONS = ("balance",)


def calibration_of_layer(vllm_config: Any, layer_name: str, geometry: Geometry) -> Calibration:
    """ValueError for unknown options and for a file of another model."""
    options = dict((vllm_config.additional_config or {}).get("oscar_kv", {}))
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ValueError(f"oscar-kv: unknown options {unknown}, known are {list(_OPTIONS)}")
    path = options.get("balance")
    if path is None:
        return Calibration()
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )
    from vllm.model_executor.models.utils import extract_layer_index

    layer = extract_layer_index(layer_name)
    ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    model = vllm_config.model_config
    device = str(vllm_config.device_config.device_type)
    file = balance_file(str(path), model.model, model.revision)
    rank = Rank(geometry.kv_heads, *ranks)
    return layer_calibration(file, model.hf_config, layer, rank, device)
