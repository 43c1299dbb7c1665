# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The calibration of one layer in a serving engine: from a balance file."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .balance import Balance
from .calibration import Calibration


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


def layer_calibration(path: str, config: Any, layer: int, rank: Rank, device: str) -> Calibration:
    """Of this rank's KV heads, from a file of `oscar calibrate`.

    ValueError for a file of another model.
    """
    whole = _load(path)
    whole.check(config)
    heads, found = rank.heads(whole.kv_heads), whole.of_layer(layer)
    parts = (found.balance, found.center, found.feedback)
    own = Calibration(*(None if part is None else part[heads] for part in parts))
    return own.checked(rank.kv_heads, whole.head_dim, torch.device(device))


@functools.lru_cache(maxsize=1)
def _load(path: str) -> Balance:
    return Balance.load(path)
