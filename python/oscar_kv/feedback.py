# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Error feedback: how the rounding error of a K channel is carried on to the channels behind it.

What counts of an error e of a key is its effect on scores, E[(q . e)^2] = e^T M e with M the second
moment of the rotated queries. Rounding the channels one after the other, the best the later ones
can do about the error of an earlier one is linear, with weights from the Cholesky factor of M's
inverse: the rule of optimal brain surgeon, as GPTQ (arXiv 2210.17323, section 3) applies it to
weights. It costs no bits and nothing when the codes are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rotate import channel_signs, hadamard

DAMPING = 0.1  # of M's mean diagonal, added to it: what the prompt's queries do not show


def feedback_factors(query_moment: Tensor, balance: Tensor) -> Tensor:
    """Weights of `CacheView::feedback`, float16 [kv_heads, head_dim, head_dim], upper triangles.

    query_moment: E[q q^T] of the unrotated queries, float32 [kv_heads, head_dim, head_dim];
    balance: float32 [kv_heads, head_dim]. A head whose queries are all zero gets no feedback.
    """
    head_dim = query_moment.shape[-1]
    factor = balance * channel_signs(head_dim).to(balance)
    moment = query_moment * factor[:, :, None] * factor[:, None, :]
    moment = hadamard(hadamard(moment.double()).transpose(1, 2))
    scale = moment.diagonal(dim1=1, dim2=2).mean(1)
    alive = (scale > 0) & torch.isfinite(scale)
    eye = torch.eye(head_dim, dtype=moment.dtype, device=moment.device)
    moment = moment / torch.where(alive, scale, 1.0)[:, None, None] + DAMPING * eye
    moment = torch.where(alive[:, None, None], moment, eye)
    upper = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    weights = upper / upper.diagonal(dim1=1, dim2=2)[:, :, None]
    return weights.triu(1).half()


def checked_feedback(value: Tensor, kv_heads: int, head_dim: int, device: torch.device) -> Tensor:
    """`value` as append takes it on `device`; ValueError for a shape or a value."""
    wanted = (kv_heads, head_dim, head_dim)
    if tuple(value.shape) != wanted:
        raise ValueError(f"feedback has shape {list(value.shape)}, must be {list(wanted)}")
    value = value.detach().to(device=device, dtype=torch.float16).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise ValueError("feedback has values that are not finite")
    return value
