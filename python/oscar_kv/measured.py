# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Balance factors and error feedback of one layer in a serving engine: from a balance file."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .balance import Balance


@dataclass(frozen=True)
class Rank:
    """This process under tensor parallelism, and how many KV heads of a layer it holds."""

    kv_heads: int
    rank: int = 0
    ranks: int = 1

    def heads(self, total: int) -> slice:
        """Its KV heads of `total`; with more ranks than heads they repeat."""
        few = total < self.ranks
        first = self.rank * total // self.ranks if few else self.rank * self.kv_heads
        return slice(first, first + self.kv_heads)


@dataclass(frozen=True)
class Measured:
    """What is fixed for one layer before its first tile is packed.

    balance float32 [kv_heads, head_dim], feedback float16 [kv_heads, head_dim, head_dim], of this
    rank's KV heads, or None.
    """

    balance: Tensor | None = None
    feedback: Tensor | None = None

    @classmethod
    def of_file(cls, path: str, config: Any, layer: int, rank: Rank, device: str) -> Measured:
        """From a file of `oscar calibrate`; ValueError for one of another model."""
        whole = _load(path)
        whole.check(config)
        heads = rank.heads(whole.kv_heads)
        balance, feedback = whole.factors.get(layer), whole.feedback.get(layer)
        on = torch.device(device)
        return cls(
            None if balance is None else balance[heads].float().contiguous().to(on),
            None if feedback is None else feedback[heads].contiguous().to(on),
        )


@functools.lru_cache(maxsize=1)
def _load(path: str) -> Balance:
    return Balance.load(path)
