# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Stresses on a copy of the model: outliers in K, and constant offsets in K and V.

`stressed`: in every KV head two RoPE pairs of K are multiplied by a factor and the same pairs of
its query heads divided by it. A pair is rotated as a whole, so no score changes; yet K has outlier
channels that carry no more than before, as some models have them by training.

`with_offsets`: a constant on given RoPE pairs of K, as large biases of k_proj make it. RoPE turns
it with the position, so the 16-bit model becomes another one: it is its own reference. A constant
on V is taken off again behind the attention, whose weights sum to 1: the model stays as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..balance import text_config

_PAIRS = 2  # of each KV head
PAIRS = ("slow", "middle", "fast")  # RoPE pairs D/2 - 1, D/4 and 0: by how far a token turns them


def stressed(model: PreTrainedModel, factor: float, seed: int = 0) -> PreTrainedModel:
    """A copy of `model` whose K has outliers `factor` times as large.

    Raises ValueError for a factor that is not positive, and NotImplementedError for a model whose
    predictions this would change: one with a norm on K or Q of each head, without projections of
    their own for Q and K, or with another kind of RoPE.
    """
    if not factor > 0:
        raise ValueError(f"stress is {factor}, must be positive")
    result = copy.deepcopy(model)
    for module in _attention_layers(result):
        _stress_layer(type(result).__name__, module, factor, seed)
    _check_unchanged(
        model, result, "its RoPE does not pair channel c with c + head_dim / 2", "the stress"
    )
    return result


@torch.no_grad()
def with_offsets(
    model: PreTrainedModel,
    offset: float,
    pairs: Sequence[str | int] = PAIRS,
    value_offset: float = 0.0,
    seed: int = 0,
) -> PreTrainedModel:
    """A copy of `model` with +-offset in both channels of some RoPE pairs of K, in every layer.

    pairs: names of PAIRS or indices 0..head_dim/2-1, pair i being the channels i and i + head_dim/2
    of every KV head. The constant stands in k_proj's bias, or behind the norm of K where a model
    has one; signs are random, by `seed`, layer, head and channel (one pattern for all heads of a
    layer where K has a norm of each head). value_offset: the same channels of V, in v_proj's bias,
    and taken off in o_proj's, which leaves the predictions as they are.

    Raises ValueError for an offset that is not finite or a pair that does not exist, and
    NotImplementedError for a model without linear k_proj, v_proj and o_proj, with RoPE on a part of
    the channels, or whose predictions the value offset would change.
    """
    for name, value in (("offset", offset), ("value_offset", value_offset)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, must be finite")
    result = copy.deepcopy(model)
    name = type(model).__name__
    if value_offset:
        for module in _attention_layers(result):
            _offset_values(name, module, _offsets(name, module, value_offset, pairs, seed, 1))
        reason = "the weights of its attention do not sum to 1, or V or the output has a norm"
        _check_unchanged(model, result, reason, "the value offset")
    if offset:
        for module in _attention_layers(result):
            _offset_keys(name, module, _offsets(name, module, offset, pairs, seed, 0))
    return result


def _attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The attention blocks of all layers. NotImplementedError if there are none."""
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "o_proj")
    ]
    if not found:
        raise NotImplementedError(f"{type(model).__name__}: no attention layer with an o_proj")
    return found


def _stress_layer(name: str, module: nn.Module, factor: float, seed: int) -> None:
    for part in ("q_norm", "k_norm", "qk_norm"):
        if getattr(module, part, None) is not None:
            raise NotImplementedError(
                f"{name}: {part} normalises each head after its projection, so that the stress "
                "would change the model"
            )
    if not (hasattr(module, "q_proj") and hasattr(module, "k_proj")):
        raise NotImplementedError(f"{name}: Q and K have no projections of their own to edit")
    head_dim = module.head_dim
    kv_heads = module.k_proj.weight.shape[0] // head_dim
    generator = torch.Generator().manual_seed(1000 * seed + module.layer_idx)
    scale = torch.ones(kv_heads, head_dim)
    for head in range(kv_heads):
        pairs = torch.randperm(head_dim // 2, generator=generator)[:_PAIRS]
        scale[head, pairs] = scale[head, pairs + head_dim // 2] = factor
    group = module.q_proj.weight.shape[0] // head_dim // kv_heads
    _scale_rows(module.k_proj, scale.flatten())
    _scale_rows(module.q_proj, 1 / scale.repeat_interleave(group, 0).flatten())


@torch.no_grad()
def _scale_rows(projection: nn.Module, scale: Tensor) -> None:
    projection.weight.mul_(scale[:, None].to(projection.weight))
    if projection.bias is not None:
        projection.bias.mul_(scale.to(projection.bias))


@torch.inference_mode()
def _check_unchanged(
    model: PreTrainedModel, changed: PreTrainedModel, reason: str, stress: str
) -> None:
    """NotImplementedError if the predictions differ: `stress` changed them, for `reason`."""
    ids = (torch.arange(64, device=model.device) * 37 + 11)[None]
    ids %= text_config(model.config).vocab_size
    expected, found = (one(input_ids=ids, use_cache=False).logits for one in (model, changed))
    error = float((found - expected).norm() / expected.norm())
    if not error < (1e-3 if model.dtype == torch.float32 else 3e-2):
        raise NotImplementedError(
            f"{type(model).__name__}: {stress} changes its predictions (by {error:.1e}): {reason}"
        )


# -- offsets -----------------------------------------------------------------------------------


def _offsets(
    name: str, module: nn.Module, offset: float, pairs: Sequence[str | int], seed: int, side: int
) -> Tensor:
    """float32 [kv_heads, head_dim], on the CPU: +-offset in the channels of `pairs`, 0 elsewhere.

    side: 0 for K, 1 for V, whose signs differ.
    """
    if not hasattr(module, "k_proj") or not hasattr(module, "v_proj"):
        raise NotImplementedError(f"{name}: K and V have no projections of their own to edit")
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    rope = rope.get(getattr(module, "layer_type", None), rope)  # some have one a kind of layer
    partial = rope.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise NotImplementedError(f"{name}: RoPE turns {partial} of a head's channels, not all")
    head_dim = module.head_dim
    kv_heads = module.k_proj.weight.shape[0] // head_dim
    generator = torch.Generator().manual_seed(1000 * seed + 2 * module.layer_idx + side)
    signs = torch.randint(0, 2, (kv_heads, head_dim), generator=generator) * 2.0 - 1.0
    result = torch.zeros(kv_heads, head_dim)
    for index in (pair_index(pair, head_dim) for pair in pairs):
        for channel in (index, index + head_dim // 2):
            result[:, channel] = offset * signs[:, channel]
    return result


def parse_offset(text: str) -> tuple[float, tuple[str, ...]]:
    """(offset, pairs) of ``X`` or ``X,pairs=A,B,...``. ValueError for another text."""
    size, comma, rest = text.partition(",")
    names = rest.removeprefix("pairs=").split(",") if comma else []
    wrong = [name for name in names if name not in PAIRS and not name.isdigit()]
    if wrong or (comma and not rest.startswith("pairs=")):
        raise ValueError(
            f"offset is {text!r}, must be X or X,pairs=A,B with pairs of {', '.join(PAIRS)} or "
            "indices"
        )
    try:
        return float(size), tuple(names) or PAIRS
    except ValueError as error:
        raise ValueError(f"offset is {text!r}: {size!r} is not a number") from error


def pair_index(pair: str | int, head_dim: int) -> int:
    """The index of a RoPE pair given by name or as itself. ValueError for one that is not there."""
    named = dict(zip(PAIRS, (head_dim // 2 - 1, head_dim // 4, 0), strict=True))
    if isinstance(pair, str) and pair not in named and not pair.isdigit():
        raise ValueError(f"pair is {pair!r}, must be one of {', '.join(PAIRS)} or an index")
    index = named[pair] if pair in named else int(pair)
    if not 0 <= index < head_dim // 2:
        raise ValueError(f"pair is {index}, must be 0 to {head_dim // 2 - 1}")
    return index


class _Shifted(nn.Module):
    """The norm of K and a constant behind it: a bias in front of the norm would be scaled away."""

    def __init__(self, norm: nn.Module, offset: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.offset = nn.Parameter(offset, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.offset  # type: ignore[no-any-return]


def _offset_keys(name: str, module: nn.Module, offset: Tensor) -> None:
    norm = getattr(module, "k_norm", None)
    if norm is None:
        _add_bias(name, "k_proj", module.k_proj, offset.flatten())
        return
    # Heads stand before or behind the tokens where it is called: one pattern fits both.
    width = norm.weight.numel()
    one = offset.flatten() if width == offset.numel() else offset[0]
    module.k_norm = _Shifted(norm, one.to(norm.weight))


def _offset_values(name: str, module: nn.Module, offset: Tensor) -> None:
    weight = module.o_proj.weight.double()
    group = weight.shape[1] // offset.numel()  # query heads that read a KV head
    read = offset.repeat_interleave(group, 0).flatten()
    _add_bias(name, "v_proj", module.v_proj, offset.flatten())
    _add_bias(name, "o_proj", module.o_proj, -(weight @ read.to(weight)))


def _add_bias(name: str, part: str, projection: nn.Module, value: Tensor) -> None:
    """Adds to a linear layer's bias, which is made if it has none."""
    if not isinstance(projection, nn.Linear):
        raise NotImplementedError(f"{name}: {part} is {type(projection).__name__}, not linear")
    if projection.bias is None:
        zero = projection.weight.new_zeros(projection.out_features)
        projection.bias = nn.Parameter(zero, requires_grad=False)
    projection.bias.add_(value.to(projection.bias))
