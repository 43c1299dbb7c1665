# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The attention function "oscar".

* plain K, V (vision towers, sliding layers): transformers' sdpa, or the model's eager function
* handles, nothing committed yet (a prompt): the same on the pending K, V, so it is exact
* handles over history: PagedCache.attend on the codes
* a mask over history that is not causal (a later image of Gemma 3, seen in both directions): sdpa
  on dequantised K, V; right but slow, and the user is warned
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .columns import NotCausalError, Step
from .handle import Handle
from .layer import OscarLayer, token_rows

NAME = "oscar"
_EAGER_QUERIES = 256  # queries per call of an eager function: bounds its score matrix


class _NoBackward(torch.autograd.Function):
    """Identity on the output of `attend`; gradients cannot pass through packed tokens."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("attention over a packed KV cache has no backward pass")


def register() -> None:
    """Makes "oscar" known to transformers, with sdpa's boolean masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, oscar_attention_forward)
    AttentionMaskInterface.register(NAME, step_mask)


def step_mask(
    *args: Any,
    q_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """sdpa's mask, and none for one new token that sees everything.

    Some releases build that one while a CUDA graph is captured.
    """
    from transformers.masking_utils import sdpa_mask

    plain = attention_mask is None and local_size is None
    if plain and q_length == 1 and allow_is_causal_skip:
        return None
    mask: Tensor | None = sdpa_mask(
        *args,
        q_length=q_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    return mask


def oscar_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [batch, q_heads, queries, head_dim] -> ([batch, queries, q_heads, head_dim], None).

    Raises ValueError for output_attentions (weights are never formed) and NotImplementedError for
    what packed tokens cannot express: a position bias, dropout, and in strict mode a mask that is
    not causal.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: attention weights are never formed; use eager attention"
        )
    if type(key) is not Handle or type(value) is not Handle:
        return dense_attention(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    _refuse_cross_attention(module)
    layer = key.checked_layer()
    pending = layer.pending
    if pending is None or pending[0].shape[2] != query.shape[2]:
        # Asked a second time, or for fewer queries than new tokens: read what is stored.
        return dense_attention(
            module, query, key.dense(), value.dense(), attention_mask, dropout, scaling, **kwargs
        )
    step = _step(layer, query, attention_mask, kwargs)
    layer.observe(query, step)
    if layer.length == 0:
        out = _exact(module, query, pending, attention_mask, step, dropout, scaling, kwargs)
    elif step.causal:
        out = _over_history(layer, query, step, dropout, scaling, kwargs)
    else:
        read = (key.dense(), value.dense())
        out = _exact(module, query, read, attention_mask, step, dropout, scaling, kwargs)
    if not layer.shared.keep_pending:
        pending = None
        layer.commit()
    return out, None


def _refuse_cross_attention(module: nn.Module) -> None:
    config = getattr(module, "config", None)
    two_sided = getattr(module, "is_causal", True) is False
    if two_sided and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(module).__name__} attends to the encoder through an OscarCache, which is for "
            "the decoder's own tokens: pass EncoderDecoderCache(OscarCache(config), DynamicCache())"
        )


def _step(layer: OscarLayer, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Step:
    """What the pending tokens are; known already if another layer shares this one's K and V."""
    if layer.step is None:
        shape = (query.shape[0], query.shape[2])
        window = kwargs.get("sliding_window") or 0
        try:
            layer.step = layer.shared.memo.step(mask, layer.columns, shape, layer.length, window)
        except NotCausalError as error:
            if layer.shared.strict:
                raise
            layer.step = error.step
    return layer.step


def _exact(
    module: nn.Module,
    query: Tensor,
    read: tuple[Tensor, Tensor],
    mask: Tensor | None,
    step: Step,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    out, _ = dense_attention(module, query, *read, mask, dropout, scaling, **kwargs)
    if step.real is None:
        return out
    # A query of padding sees no key: its softmax is NaN in some kernels, and NaN in the K and V
    # that the next layer makes of it would reach the real rows through 0 * NaN.
    return out.masked_fill(~step.real[:, :, None, None], 0.0)


def _over_history(
    layer: OscarLayer,
    query: Tensor,
    step: Step,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    batch, q_heads, queries, head_dim = query.shape
    if dropout:
        raise NotImplementedError(f"dropout is {dropout}: packed attention is for inference")
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position_bias on packed tokens is not supported")
    if queries > 1 and kwargs.get("is_causal") is False:
        raise NotImplementedError("is_causal=False over packed history is not supported")
    paged, pending = layer.paged, layer.pending
    assert paged is not None and pending is not None
    sinks = kwargs.get("s_aux")
    rows = step.rows
    if layer.shared.strict:
        k_rows, v_rows = (token_rows(x, rows) for x in pending)
        layer.measure(k_rows, v_rows, step.query_start)  # before tiles are packed
    out, _ = paged.attend(
        token_rows(query, rows),
        token_rows(pending[0], rows),
        token_rows(pending[1], rows),
        step.query_start,
        scale=head_dim**-0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap") or 0.0,
        sliding_window=step.sliding_window,
        sink_logits=None if sinks is None else sinks.detach().float(),
        strict=layer.shared.strict,
        plans=layer.shared.plans,
    )
    if rows is not None:
        full = out.new_zeros(batch * queries, q_heads, head_dim)
        out = full.index_copy_(0, rows, out)
    out = out.view(batch, queries, q_heads, head_dim)
    if query.requires_grad and torch.is_grad_enabled():
        out = _NoBackward.apply(out, query)
    return out


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' sdpa function, or the model's eager one for softcap and sink logits."""
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        kwargs.pop("softcap", None)
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"{type(module).__name__} asks for a logit soft cap or sink logits, and its module has "
            "no eager_attention_forward"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    parts = []
    for start in range(0, query.shape[2], _EAGER_QUERIES):
        stop = min(start + _EAGER_QUERIES, query.shape[2])
        additive = _additive_mask(query, key, mask, start, stop, kwargs.get("is_causal"))
        part = query[:, :, start:stop]
        out, _ = eager(
            module, part, key, value, additive, dropout=dropout, scaling=scaling, **kwargs
        )
        parts.append(out)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), None


def _additive_mask(
    query: Tensor, key: Tensor, mask: Tensor | None, start: int, stop: int, causal: bool | None
) -> Tensor | None:
    """Rows start..stop of the mask as numbers to add; no mask means causal, as for sdpa."""
    queries, columns = query.shape[2], key.shape[2]
    if mask is None:
        if queries == 1 or causal is False:
            return None
        position = torch.arange(columns, device=query.device)
        mask = (position <= position[columns - queries :][start:stop, None])[None, None]
    else:
        mask = mask[:, :, start:stop]
    if mask.dtype != torch.bool:
        return mask
    low = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, low)
