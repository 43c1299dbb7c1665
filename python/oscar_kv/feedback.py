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

from .rotate import rotation

DAMPING = 0.1  # of M's mean diagonal, added to it: what the prompt's queries do not show


def feedback_factors(query_moment: Tensor, balance: Tensor) -> Tensor:
    """Weights of `CacheView::feedback`, float16 [kv_heads, head_dim, head_dim], upper triangles.

    query_moment: E[q q^T] of the unrotated queries, float32 [kv_heads, head_dim, head_dim];
    balance: float32 [kv_heads, head_dim]. A head whose queries are all zero gets no feedback.
    """
    head_dim = query_moment.shape[-1]
    turn = balance[:, :, None].double() * rotation(head_dim).to(balance.device)
    moment = turn.transpose(1, 2) @ query_moment.double() @ turn
    scale = moment.diagonal(dim1=1, dim2=2).mean(1)
    alive = (scale > 0) & torch.isfinite(scale)
    eye = torch.eye(head_dim, dtype=moment.dtype, device=moment.device)
    moment = moment / torch.where(alive, scale, 1.0)[:, None, None] + DAMPING * eye
    moment = torch.where(alive[:, None, None], moment, eye)
    # The upper Cholesky factor U of the inverse, without it: moment = W W^T with W upper triangular
    # (Cholesky from the last channel on), and U = W^-1.
    last_first = moment.flip(1, 2)
    upper = torch.linalg.cholesky(last_first).flip(1, 2)
    inverse = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    weights = inverse / inverse.diagonal(dim1=1, dim2=2)[:, :, None]
    return weights.triu(1).half()
