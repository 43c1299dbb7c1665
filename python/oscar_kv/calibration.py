# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured of one layer's Q, K and V before its first tile is packed.

* balance: K is divided and Q multiplied by ``balance[h, c] = sqrt(sk / sq)`` before both are
  rotated, so no score changes, while the rotation no longer spreads a large but unimportant K
  channel over all others. ``sk`` is the standard deviation of K within its 32-token groups, ``sq``
  the root mean square of Q over the query heads of the KV head; both are averaged over the RoPE
  pair (c, c + D/2).
* center: the mean key of heads whose keys are mostly a constant, as large biases make them. It is
  taken off before packing; a query adds its product with it to all packed scores, which softmax
  cannot see, so that neither mids nor norms have to hold it.
* feedback: weights that carry rounding errors on to later channels (feedback.py).

A text that says little (one token repeated, blank lines) would spoil all three: a channel that
happened not to vary would look unimportant. So everything is shrunk towards "nothing measured" by
the evidence of the text, see `evidence`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .feedback import feedback_factors
from .rotate import rotated_center

GROUP_TOKENS = 32  # tokens of a tile: K's range is measured within such groups
# Tokens of a sequence, spread evenly over it, that are looked at. All 8000 tokens of the demo model
# instead change the balance by 0.6 % on average, 3 % at most.
SAMPLE_TOKENS = 2048
# A head's mean key is taken off if it is so many times as long as the rest. Biases of Qwen2.5 make
# 6 to 61; below that, norms of what is left differ more between tokens than those of whole keys.
CENTER_RATIO = 5.0
MAX_INPUT = 65504.0  # largest magnitude of K, V and a center (fp16's)
MAX_BALANCE = 64.0  # and its inverse: beyond, a channel is dead, not of a scale worth following
# The parts of a calibration.
DTYPES = {"balance": torch.float32, "center": torch.float32, "feedback": torch.float16}
_FLOOR = 1e-8  # of a head's mean square: what counts as zero
_EVIDENCE_TOKENS = 512  # of V: enough to tell whether tokens differ
_EVIDENCE_NONE, _EVIDENCE_FULL = 2.0, 5.0  # independent directions of V
_SAME = 1e-10  # of V's mean square: vectors that differ by less are the same, but for rounding


@dataclass(frozen=True)
class Calibration:
    """What is fixed for one layer before its first tile is packed, or None each: not measured.

    balance float32 [kv_heads, head_dim]; center float32 [kv_heads, head_dim], in the model's basis;
    feedback float16 [kv_heads, head_dim, head_dim].
    """

    balance: Tensor | None = None
    center: Tensor | None = None
    feedback: Tensor | None = None

    def checked(self, kv_heads: int, head_dim: int, device: torch.device) -> Calibration:
        """The same on `device`, contiguous; ValueError for a shape or a value."""
        found: dict[str, Tensor] = {}
        for name, dtype in DTYPES.items():
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            wanted = part_shape(name, kv_heads, head_dim)
            if tuple(value.shape) != wanted:
                raise ValueError(f"{name} has shape {list(value.shape)}, must be {list(wanted)}")
            value = value.detach().to(device=device, dtype=dtype).contiguous()
            check_values(name, name, value)
            found[name] = value
        return Calibration(**found)

    def differs(self, other: Calibration) -> list[str]:
        """Names of the members that are not the same."""
        pairs = ((x.name, getattr(self, x.name), getattr(other, x.name)) for x in fields(self))
        return [
            name
            for name, a, b in pairs
            if a is not b and (a is None or b is None or not torch.equal(a, b))
        ]

    def arrays(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(balance, feedback, center in the rotated basis), as `_core.CacheArrays` takes them.

        ValueError for a center that is too large once it is rotated.
        """
        if self.center is None:
            return self.balance, self.feedback, None
        turned = rotated_center(self.center, self.balance)
        check_values("center", "center, rotated,", turned)
        return self.balance, self.feedback, turned


def part_shape(name: str, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """The shape of balance, center or feedback."""
    shape = (kv_heads, head_dim)
    return (*shape, head_dim) if name == "feedback" else shape


def calibration_part(name: str) -> property:
    """A member of ``self.calibration`` as a property that can be set by itself."""

    def get(cache: Any) -> Tensor | None:
        value: Tensor | None = getattr(cache.calibration, name)
        return value

    def put(cache: Any, value: Tensor | None) -> None:
        cache.calibration = replace(cache.calibration, **{name: value})

    return property(get, put, doc=f"`Calibration.{name}`")


def check_values(kind: str, where: str, value: Tensor) -> None:
    """ValueError naming the first value that a balance, center or feedback may not have."""
    if kind == "balance":
        wrong, limit = ~((value >= 1 / MAX_BALANCE) & (value <= MAX_BALANCE)), "from 1/64 to 64"
    elif kind == "center":
        wrong, limit = ~(value.abs() <= MAX_INPUT), f"at most {MAX_INPUT:.0f} in magnitude"
    else:
        wrong, limit = ~torch.isfinite(value), "finite"
    if bool(wrong.any()):
        raise ValueError(f"{where} has a value of {float(value[wrong][0])}, must be {limit}")


def _sampled(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, spread evenly."""
    return rows[:: max(1, -(-rows.shape[0] // most))]


class QueryStatistics:
    """Running second moment of Q per query head."""

    def __init__(self) -> None:
        self.total: Tensor | None = None  # float32 [q_heads, head_dim, head_dim]
        self.count = 0

    def observe(self, q: Tensor) -> None:
        """Adds q [tokens, q_heads, head_dim] (any strides), SAMPLE_TOKENS of them at most."""
        if q.shape[0] == 0:
            return
        q = _sampled(q, SAMPLE_TOKENS)
        heads = q.detach().float().transpose(0, 1)
        moment = heads.transpose(1, 2) @ heads
        self.total = moment if self.total is None else self.total + moment
        self.count += q.shape[0]

    def moment(self, kv_heads: int) -> Tensor | None:
        """E[q q^T] over tokens and the query heads of a KV head, float32 [kv_heads, head_dim,
        head_dim]; None if nothing was observed."""
        if self.total is None:
            return None
        return (self.total / self.count).unflatten(0, (kv_heads, -1)).mean(1)

    def mean_square(self, kv_heads: int) -> Tensor | None:
        """Diagonal of `moment`: float32 [kv_heads, head_dim], or None."""
        moment = self.moment(kv_heads)
        return None if moment is None else moment.diagonal(dim1=1, dim2=2)


def key_variance(sequences: list[Tensor]) -> Tensor | None:
    """Mean variance of K within groups of 32 tokens, float32 [kv_heads, head_dim].

    sequences: [tokens, kv_heads, head_dim] each; incomplete groups are left out, and of long
    sequences all but SAMPLE_TOKENS. None if no sequence has a complete group.
    """
    total: Tensor | None = None
    groups = 0
    for keys in sequences:
        count = keys.shape[0] // GROUP_TOKENS
        if count == 0:
            continue
        grouped = keys.detach()[: count * GROUP_TOKENS].unflatten(0, (count, GROUP_TOKENS))
        grouped = grouped[:: -(-count * GROUP_TOKENS // SAMPLE_TOKENS)]
        part = grouped.float().var(dim=1, correction=0).sum(0)
        total = part if total is None else total + part
        groups += grouped.shape[0]
    return None if total is None else total / groups


def center_ratio(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(c float32 [kv_heads, head_dim], ratio [kv_heads]): the mean key of each head, and its length
    over the root mean square length of what is left of a key without it.

    sequences: [tokens, kv_heads, head_dim] each; of long ones SAMPLE_TOKENS, spread evenly.
    """
    keys = torch.cat([_sampled(k.detach(), SAMPLE_TOKENS) for k in sequences]).float()
    mean = keys.mean(0)
    rest = (keys - mean).square().sum(-1).mean(0).sqrt()
    length = mean.norm(dim=-1)
    ratio = torch.where(rest > 0, length / rest, torch.where(length > 0, torch.inf, 0.0))
    return mean, ratio


def key_center(sequences: list[Tensor], ratio: float = CENTER_RATIO) -> Tensor:
    """What is taken off K before it is packed, float32 [kv_heads, head_dim]: the mean key of heads
    whose keys are mostly a constant, 0 for all others."""
    center, found = center_ratio(sequences)
    return torch.where((found > ratio)[:, None], center, 0.0)


def balance_factors(key_var: Tensor, query_ms: Tensor) -> Tensor:
    """sqrt(sk / sq) from K's variance and Q's mean square, all float32 [kv_heads, head_dim].

    A channel (or head) without K or without Q gets 1 or the nearest limit of [1/64, 64].
    """

    def prepared(x: Tensor) -> Tensor:
        pair = x.unflatten(-1, (2, -1)).mean(-2).repeat(1, 2)
        mean = pair.mean(-1, keepdim=True)
        pair = torch.maximum(pair, mean * _FLOOR)
        return torch.where((mean > 0) & torch.isfinite(mean), pair, torch.ones_like(pair))

    alive = (key_var.sum(-1, keepdim=True) > 0) & (query_ms.sum(-1, keepdim=True) > 0)
    factors = (prepared(key_var) / prepared(query_ms)).pow(0.25).clamp(1 / MAX_BALANCE, MAX_BALANCE)
    return torch.where(alive & torch.isfinite(factors), factors, torch.ones_like(factors))


def evidence(sequences: list[Tensor]) -> float:
    """How much a text can say about a layer, 0 (nothing) to 1, from V [tokens, kv_heads, head_dim].

    By the effective number of independent directions of V around its mean, (sum of eigenvalues)^2 /
    sum of their squares, which neither scales nor biases of V change. In the first layer that is 1
    to 2.5 for words and blank lines that repeat, at least 5 for 32 tokens of text (measured on
    SmolLM2, Qwen2.5 and Gemma 3). In later layers a single repeated token drifts through more: what
    the layers before could not tell, a layer cannot either.
    """
    rows = _sampled(torch.cat(sequences).detach(), _EVIDENCE_TOKENS).flatten(1).float()
    rest = rows - rows.mean(0)
    gram = rest @ rest.T
    spread = gram.diagonal().sum()
    directions = spread.square() / gram.square().sum()
    varies = spread > rows.square().sum() * _SAME  # else what is left is rounding
    share = (directions - _EVIDENCE_NONE) / (_EVIDENCE_FULL - _EVIDENCE_NONE)
    return float(torch.where(varies, share, 0.0).clamp(0.0, 1.0))


def calibrate_layer(
    keys: list[Tensor],
    queries: QueryStatistics,
    weight: float,
    balance: Tensor | None = None,
    ratio: float = CENTER_RATIO,
) -> Calibration | None:
    """The calibration of a layer from its K [tokens, kv_heads, head_dim] a sequence.

    weight: the text's `evidence`. balance: one that is in use already and stays. ratio: see
    `key_center`. None if there is nothing to measure: no sequence of 32 tokens, no query, or values
    that are not finite.
    """
    kv_heads = keys[0].shape[1]
    variance, moment = key_variance(keys), queries.moment(kv_heads)
    if variance is None or moment is None:
        return None
    query_ms = moment.diagonal(dim1=1, dim2=2)
    if not bool(torch.isfinite(variance + query_ms).all()):
        return None
    if weight == 0:
        return Calibration()
    if balance is None:
        balance = balance_factors(variance, query_ms).pow(weight)
    center = key_center(keys, ratio) if weight == 1 else None
    if center is not None and not bool(center.any()):
        center = None
    return Calibration(balance, center, feedback_factors(moment, balance) * weight)
