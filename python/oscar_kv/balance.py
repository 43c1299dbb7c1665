# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The calibration of a model (calibration.py), kept in a safetensors file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .calibration import DTYPES, GROUP_TOKENS, Calibration, check_values, part_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FORMAT_NAME = "oscar-kv-balance"
FORMAT_VERSION = "2"  # 2: centers; measured for tiles of format 2
_NAMES = {"balance": "layer", "center": "center", "feedback": "feedback"}  # of tensors: NAME.LAYER


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's part of a (possibly composite) model configuration."""
    result: PreTrainedConfig = config.get_text_config(decoder=True)
    return result


def kv_shapes(config: PreTrainedConfig) -> list[tuple[int, int, int]]:
    """(query heads, KV heads, head_dim) of each full-attention layer of a text configuration.

    All layers where the configuration does not tell their types apart.
    """
    count = int(config.num_hidden_layers)
    layers = getattr(config, "per_layer_config", None) or [config] * count
    types = getattr(config, "layer_types", None) or ["full_attention"] * count
    full = [c for c, kind in zip(layers, types, strict=False) if kind == "full_attention"]
    shapes = []
    for layer in full or layers:
        q_heads = int(layer.num_attention_heads)
        kv_heads = int(getattr(layer, "num_key_value_heads", None) or q_heads)
        head_dim = int(getattr(layer, "head_dim", None) or layer.hidden_size // q_heads)
        shapes.append((q_heads, kv_heads, head_dim))
    return shapes


def _identity(config: PreTrainedConfig) -> dict[str, str | int]:
    """What a balance has in common with the model it was measured on."""
    text = text_config(config)
    _, kv_heads, head_dim = kv_shapes(text)[0]
    return {
        "model_type": str(text.model_type),
        "num_layers": int(text.num_hidden_layers),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }


@dataclass
class Balance:
    """The calibration of a model's layers: ``factors[layer]``, the balance, float32 [kv_heads,
    head_dim], 1/64 to 64; ``feedback[layer]``, where measured, float16 [kv_heads, head_dim,
    head_dim] (feedback.py); ``centers[layer]``, where a head has one, float32 [kv_heads, head_dim],
    0 for heads without.

    kv_heads and head_dim are those of the first full-attention layer. Layers that are missing
    (sliding-window or linear layers) are not packed and need none.
    """

    model_type: str
    num_layers: int
    kv_heads: int
    head_dim: int
    factors: dict[int, Tensor] = field(default_factory=dict)
    feedback: dict[int, Tensor] = field(default_factory=dict)
    centers: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def for_config(
        cls,
        config: PreTrainedConfig,
        factors: dict[int, Tensor],
        feedback: dict[int, Tensor] | None = None,
        centers: dict[int, Tensor] | None = None,
    ) -> Balance:
        """A balance that belongs to models of this configuration."""
        identity: dict[str, Any] = _identity(config)
        return cls(
            **identity,
            factors=dict(factors),
            feedback=dict(feedback or {}),
            centers=dict(centers or {}),
        )

    def of_layer(self, layer: int) -> Calibration:
        """What is known of a layer."""
        parts = (self.factors.get(layer), self.centers.get(layer), self.feedback.get(layer))
        return Calibration(*parts)

    def centered_heads(self) -> int:
        """KV heads whose keys are mostly a constant, of all layers."""
        return sum(int(center.any(-1).sum()) for center in self.centers.values())

    def check(self, config: PreTrainedConfig) -> None:
        """Raises ValueError naming what differs if this was not measured on such a model."""
        for name, value in _identity(config).items():
            found = getattr(self, name)
            if found != value:
                raise ValueError(
                    f"balance belongs to another model: {name} is {found}, the model has {value}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file: tensors ``layer.N``, ``center.N`` and ``feedback.N``, and in
        its metadata which model they belong to."""
        from safetensors.torch import save_file

        metadata = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "model_type": self.model_type,
            "shape": json.dumps([self.num_layers, self.kv_heads, self.head_dim]),
        }
        parts = {"balance": self.factors, "center": self.centers, "feedback": self.feedback}
        tensors = {
            f"{_NAMES[part]}.{layer}": value.to("cpu", DTYPES[part]).contiguous()
            for part, values in parts.items()
            for layer, value in values.items()
        }
        save_file(tensors, os.fspath(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Balance:
        """Reads what `save` wrote.

        Raises FileNotFoundError, or ValueError for a file that is corrupt, truncated, of another
        kind or version, or holds values that append would not take.
        """
        from safetensors import SafetensorError, safe_open

        name = os.fspath(path)
        if not Path(name).is_file():
            raise FileNotFoundError(f"balance file not found: {name}")
        try:
            with safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} is not a readable balance file: {error}") from error
        return cls._parse(name, metadata, tensors)

    @classmethod
    def _parse(cls, name: str, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Balance:
        if metadata.get("format") != FORMAT_NAME:
            raise ValueError(f"{name} is not a balance file: format is {metadata.get('format')!r}")
        if metadata.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{name}: balance format version is {metadata.get('version')!r}, "
                f"this release reads {FORMAT_VERSION!r}: measure it again with `oscar calibrate`"
            )
        try:
            model_type = metadata["model_type"]
            num_layers, kv_heads, head_dim = (int(x) for x in json.loads(metadata["shape"]))
            feedback, centers = _taken(tensors, "feedback."), _taken(tensors, "center.")
            factors = {int(key.removeprefix("layer.")): value for key, value in tensors.items()}
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{name}: damaged balance metadata: {error!r}") from error
        parts = {"balance": factors, "center": centers, "feedback": feedback}
        for part, values in parts.items():
            for layer, value in values.items():
                where = f"{name}: {_NAMES[part]} {layer}"
                _check(where, part, value, part_shape(part, kv_heads, head_dim))
                if not 0 <= layer < num_layers:
                    raise ValueError(f"{where} is not in 0..{num_layers - 1}")
                if layer not in factors:
                    raise ValueError(f"{where} belongs to no layer of the file")
        return cls(model_type, num_layers, kv_heads, head_dim, factors, feedback, centers)


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[int, Tensor]:
    """The tensors ``prefixN`` by N, removed from `tensors`."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {int(name.removeprefix(prefix)): tensors.pop(name) for name in names}


def _check(where: str, part: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.dtype != DTYPES[part] or tuple(value.shape) != shape:
        raise ValueError(
            f"{where}: expected {DTYPES[part]} {list(shape)}, found {value.dtype} "
            f"{list(value.shape)}"
        )
    check_values(part, where, value)


@torch.no_grad()
def calibrate(model: PreTrainedModel, input_ids: Tensor, **forward_kwargs: Any) -> Balance:
    """Measures balance, center and feedback of `model` on one batch of text (calibration.py).

    input_ids: int64 [batch, tokens], at least 32 tokens (a few hundred are plenty).
    forward_kwargs: further arguments of the forward pass, such as attention_mask or pixel_values.
    The model's weights and attention implementation are left as they were.
    Raises ValueError for a model that cannot be packed (see `enable`) or a text that is too short.
    """
    from .hf.cache import OscarCache
    from .hf.install import attention_installed

    if input_ids.dim() != 2 or input_ids.shape[1] < GROUP_TOKENS:
        raise ValueError(
            f"input_ids must be [batch, tokens] with at least {GROUP_TOKENS} tokens, "
            f"got {list(input_ids.shape)}"
        )
    cache = OscarCache(model.config, balance="auto")
    with attention_installed(model):
        backbone = getattr(model, "base_model", model)  # the logits are not needed
        backbone(input_ids=input_ids, past_key_values=cache, use_cache=True, **forward_kwargs)
        cache.commit()
    if not cache.balances:
        raise ValueError(
            f"nothing was measured: no sequence of input_ids has {GROUP_TOKENS} tokens that are "
            "not padding, or they repeat few tokens only"
        )
    return cache.calibrated()
