# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a model once and hands Q, K and V of each packed layer to a visitor, layer by layer.

They are taken where OscarCache gets them, so any model that `enable` accepts can be measured, and
nothing of a layer is kept after its visit: memory does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..balance import Balance
from ..calibration import GROUP_TOKENS
from .measure import (
    LayerMeasure,
    LayerTensors,
    Measurement,
    Settings,
    measure_layer,
    measured_calibration,
)
from .tokens import Token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..hf import OscarCache

Visitor = Callable[[int, Tensor, Tensor, Tensor], None]  # layer, q, k, v [heads, tokens, head_dim]


def visiting_cache(config: Any, visit: Visitor) -> OscarCache:
    """A cache for one prompt of one sequence: shows each layer to `visit` and packs nothing."""
    from ..hf.cache import OscarCache
    from ..hf.layer import OscarLayer
    from ..hf.shared import Shared

    class VisitedLayer(OscarLayer):
        def __init__(self, index: int, shared: Shared) -> None:
            super().__init__(index, shared)
            self.visited = False

        def observe(self, query: Tensor, step: Any) -> None:
            # A layer that others share K and V with is asked again, with their queries.
            if not self.visited and self.pending is not None:
                self.visited = True
                visit(self.index, query[0], self.pending[0][0], self.pending[1][0])

        def commit(self) -> None:
            if self.pending is not None:
                self.length += self.pending[0].shape[2]
                self.pending = self.step = None

    cache = OscarCache(config, balance=None)
    cache.layers = [
        VisitedLayer(layer.index, cache.shared) if isinstance(layer, OscarLayer) else layer
        for layer in cache.layers
    ]
    return cache


def _score_options(model: PreTrainedModel) -> dict[int, dict[str, Any]]:
    """By layer: scale, softcap, sink logits of its scores, as transformers' modules name them."""
    options: dict[int, dict[str, Any]] = {}
    for module in model.get_decoder().modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not hasattr(module, "scaling"):
            continue
        options[index] = {
            "scale": float(module.scaling),
            "softcap": float(getattr(module, "attn_logit_softcapping", None) or 0.0),
            "sink_logits": getattr(module, "sinks", None),
        }
    return options


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    input_ids: Tensor,
    tokens: Sequence[Token],
    settings: Settings | None = None,
    *,
    balance: Balance | None = None,
    name: str = "",
    **forward_kwargs: Any,
) -> Measurement:
    """Measures one sequence: input_ids int64 [1, tokens], at least 32.

    tokens: one a column, from `label_tokens`. balance: balance and centers for the cache; None
    measures them on this text, as a cache does. forward_kwargs: further arguments of the forward
    pass (pixel_values and so on). The model is left as it was. Raises ValueError for a model that
    cannot be packed, more than one sequence, a text that is too short, and tokens of another
    number.
    """
    from ..hf.install import attention_installed

    settings = settings or Settings()
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < GROUP_TOKENS:
        raise ValueError(
            f"input_ids must be [1, tokens] with at least {GROUP_TOKENS} tokens, "
            f"got {list(input_ids.shape)}"
        )
    if len(tokens) != input_ids.shape[1]:
        raise ValueError(
            f"tokens has {len(tokens)} entries, input_ids {input_ids.shape[1]} columns"
        )
    if balance is not None:
        balance.check(model.config)
    found: list[LayerMeasure] = []
    weight = 1.0  # evidence of the text, by all layers so far
    options: dict[int, dict[str, Any]] = {}

    def visit(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        nonlocal weight
        q, k, v = (x.detach().to("cpu", torch.float32) for x in (q, k, v))
        tensors = LayerTensors(q, k, v, **options.get(layer, {}))
        if balance is not None and layer in balance.factors:
            calibration = balance.of_layer(layer)
        else:
            calibration, weight = measured_calibration(tensors, weight)
        found.append(measure_layer(layer, tensors, settings, calibration))

    with attention_installed(model):
        options = _score_options(model)
        backbone = getattr(model, "base_model", model)  # the logits are not needed
        backbone(
            input_ids=input_ids,
            past_key_values=visiting_cache(model.config, visit),
            use_cache=True,
            **forward_kwargs,
        )
    whole = len(tokens) // GROUP_TOKENS * GROUP_TOKENS
    return Measurement(name, settings, list(tokens[:whole]), found)
