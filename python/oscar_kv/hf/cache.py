# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""OscarCache: a transformers cache whose full-attention layers are packed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from ..balance import Balance, text_config
from ..calibration import Calibration
from .columns import row_list
from .layer import OscarLayer
from .shared import Shared
from .survey import Survey, survey_layers

BalanceLike = Balance | str | os.PathLike[str] | None  # str: "auto" or a path


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a cache by part.

    packed: pages of codes, unused pages included; exact: ring and sinks in the model's dtype;
    tables: block tables, lengths, balance; pending: dense K and V not yet committed;
    other: layers that transformers keeps itself (sliding window, linear attention).
    elements: K and V elements of the tokens in the packed layers.
    """

    packed: int
    exact: int
    tables: int
    pending: int
    other: int
    elements: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.packed + self.exact + self.tables + self.pending + self.other

    @property
    def bits_per_element(self) -> float:
        """Bits an element of the packed layers, everything they hold counted; 0 when empty."""
        held = self.packed + self.exact + self.tables + self.pending
        return 8.0 * held / self.elements if self.elements else 0.0


def resolve_balance(
    balance: BalanceLike, config: PreTrainedConfig
) -> dict[int, Calibration] | None:
    """Calibrations by layer that a `balance` argument stands for; None: measure them ("auto").

    Raises ValueError for a balance of another model, TypeError for any other kind of value.
    """
    if balance is None:
        return {}
    if isinstance(balance, str) and balance == "auto":
        return None
    if isinstance(balance, str | os.PathLike):
        balance = Balance.load(balance)
    if not isinstance(balance, Balance):
        raise TypeError(
            f'balance must be "auto", None, a Balance or a path, got {type(balance).__name__}'
        )
    balance.check(config)
    return {layer: balance.of_layer(layer) for layer in balance.factors}


class OscarCache(DynamicCache):  # type: ignore[misc]
    """`past_key_values` for any decoder of transformers: about 2.25 bits per element.

    config: the model's configuration. format: "k2v2", "k4v2" or "k4v4". window: newest tokens kept
    exact, and the largest `crop`. sinks: first tokens kept exact, 0 to 32. balance: "auto" measures
    this cache's own prompt when its first 32 tokens are there (calibration.py), None measures
    nothing, else a `Balance` or the path of one.

    strict: within a call of several tokens each query reads what it would read if the tokens came
    one by one, so that results do not depend on how a text is cut into calls; without it the call's
    own tokens are exact to each other. The first call of a cache is exact either way.

    Layers that cannot be packed (`survey` names them: sliding-window, linear, shared ones) stay
    transformers' own. With a model prepared by `oscar_kv.enable` attention runs on the codes; any
    other model reads dequantised K and V. For an encoder-decoder this is the self-attention cache:
    EncoderDecoderCache(OscarCache(config), DynamicCache()).

    Raises ValueError for settings out of range, a model without full-attention layers (nothing
    would be packed), and a balance of another model.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        format: str = "k2v2",
        window: int = 32,
        sinks: int = 4,
        balance: BalanceLike = "auto",
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(
                f"OscarCache needs the model's config, got {type(config).__name__}: "
                "OscarCache(model.config)"
            )
        if kwargs.pop("offloading", False):
            raise ValueError("offloading=True is not supported by OscarCache")
        check_settings(format, window, sinks)
        self.config = config
        text = text_config(config)
        known = resolve_balance(balance, config)
        super().__init__(config=config, **kwargs)
        self.shared = Shared(
            format=format,
            window=window,
            sinks=sinks,
            measure=known is None,
            given=known or {},
            strict=bool(strict),
            keep_pending=int(getattr(text, "num_kv_shared_layers", 0) or 0) > 0,
        )
        self.survey: Survey = survey_layers(text, self.layers)
        if not self.survey.packed:
            raise ValueError(nothing_to_pack(text, self.survey))
        self.layers: list[Any] = [
            layer if index in self.survey.kept else OscarLayer(index, self.shared)
            for index, layer in enumerate(self.layers)
        ]
        self.shared.first = next(layer.index for layer in self._packed_layers())

    def _packed_layers(self) -> Iterator[OscarLayer]:
        return (layer for layer in self.layers if isinstance(layer, OscarLayer))

    @property
    def balances(self) -> dict[int, Tensor]:
        """Balance factors in use by layer, float32 [kv_heads, head_dim]; missing: 1."""
        return self.calibrated().factors

    def calibrated(self) -> Balance:
        """What the packed layers were measured to be or given, to be saved or passed on."""
        found = {
            layer.index: layer.paged.calibration
            for layer in self._packed_layers()
            if layer.paged is not None
        }
        known = [
            {i: x for i, one in found.items() if (x := getattr(one, name)) is not None}
            for name in ("balance", "feedback", "center")
        ]
        return Balance.for_config(self.config, *known)

    @property
    def dequantizations(self) -> int:
        """How often a layer was dequantised because an operation could not read its codes."""
        return self.shared.dequantizations

    def commit(self) -> None:
        """Packs tokens that are still pending (the attention function does it by itself)."""
        for layer in self._packed_layers():
            layer.commit()

    def check(self) -> None:
        """Waits for the GPU; ValueError naming the layer if K or V held what cannot be stored.

        On the CPU that is an error of the forward pass itself. On a GPU it is known only once the
        kernels have run: raised by a later forward pass, at the end of ``generate``, or by this.
        """
        for layer in self._packed_layers():
            layer.check()

    def memory(self) -> Memory:
        """Resident bytes by part, from the storages held."""
        parts = {"packed": 0, "exact": 0, "tables": 0}
        pending = other = elements = 0
        for layer in self.layers:
            if not isinstance(layer, OscarLayer):
                other += _tensor_bytes(layer)
                continue
            if layer.paged is None:
                continue
            for name, size in layer.paged.memory().items():
                parts[name] += size
            tokens = sum(layer.paged.lengths)
            if layer.pending is not None:
                pending += sum(x.numel() * x.element_size() for x in layer.pending)
                tokens += layer.pending[0].shape[0] * layer.pending[0].shape[2]
            elements += 2 * tokens * layer.paged.kv_heads * layer.paged.head_dim
        columns = {
            id(layer.columns): layer.columns.numel()
            for layer in self._packed_layers()
            if layer.columns is not None
        }
        parts["tables"] += sum(columns.values())
        return Memory(**parts, pending=pending, other=other, elements=elements)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest -tokens_to_remove tokens; ValueError beyond the exact window."""
        # Packed layers first: they are the ones that may refuse, and then nothing has changed.
        for layer in self._packed_layers():
            layer.crop(tokens_to_remove)
        shared: dict[int, Tensor] = {}
        for layer in self._packed_layers():
            if layer.columns is not None:
                layer.columns = shared.setdefault(layer.length, layer.columns)
        for layer in self.layers:
            if not isinstance(layer, OscarLayer):
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes old row beam_idx[i] (beam search)."""
        self._select(beam_idx.tolist())
        for layer in self.layers:
            if not isinstance(layer, OscarLayer):
                layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times; full pages are shared, not copied."""
        batch = max((layer.batch_size for layer in self._packed_layers()), default=0)
        self._select([row for row in range(batch) for _ in range(repeats)])
        for layer in self.layers:
            if not isinstance(layer, OscarLayer):
                layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices` (integers or bool [batch])."""
        self._select(row_list(indices))
        for layer in self.layers:
            if not isinstance(layer, OscarLayer):
                layer.batch_select_indices(indices)

    def _select(self, indices: list[int]) -> None:
        # The record of columns stays one object for all layers: masks are checked once a step.
        chosen: dict[int, Tensor] = {}
        for layer in self._packed_layers():
            layer.commit()
            columns = layer.columns
            if columns is not None:
                columns = chosen.setdefault(id(columns), columns[indices])
            layer.select(indices, columns)

    @property
    def batch_size(self) -> int:
        """Sequences, -1 before the first update."""
        return max((layer.batch_size for layer in self._packed_layers()), default=-1)

    def __repr__(self) -> str:
        packed = sum(1 for _ in self._packed_layers())
        return (
            f"OscarCache(format={self.shared.format!r}, packed layers={packed} of "
            f"{len(self.layers)}, tokens={self.get_seq_length()})"
        )


def check_settings(format: str, window: int, sinks: int) -> None:
    """Raises ValueError naming the setting that is out of range."""
    from .. import _core

    if format not in _core.formats():
        raise ValueError(f"format is {format!r}, must be one of {', '.join(_core.formats())}")
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise ValueError(f"window is {window!r}, must be an integer of 0 or more")
    if isinstance(sinks, bool) or not isinstance(sinks, int) or not 0 <= sinks <= 32:
        raise ValueError(f"sinks is {sinks!r}, must be an integer from 0 to 32")


def nothing_to_pack(text: PreTrainedConfig, survey: Survey) -> str:
    """Why a model of this configuration has no layer that could be packed."""
    name = f"model type {text.model_type!r}"
    if survey.kept and all(reason.startswith("sliding window") for reason in survey.reasons):
        window = getattr(text, "sliding_window", None)
        return (
            f"{name}: every attention layer is a sliding-window layer (sliding_window={window}), "
            "nothing would be packed. Where the context stays below the window, set "
            "config.sliding_window = None before loading the model"
        )
    return f"{name} has no layer whose K and V could be packed: {'; '.join(survey.reasons)}"


def _tensor_bytes(layer: object) -> int:
    """Bytes of the tensors that one of transformers' layers holds."""
    total = 0
    for value in vars(layer).values():
        values = value.values() if isinstance(value, dict) else [value]
        total += sum(x.untyped_storage().nbytes() for x in values if isinstance(x, torch.Tensor))
    return total
