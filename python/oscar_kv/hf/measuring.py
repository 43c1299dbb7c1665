# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration of a layer while a cache grows: what a cache's own tokens say, and when.

Each cache measures its own prompt, at the first 32 tokens or more: what another text was like
changes nothing. Balance and center are fixed from then on, since tiles are packed with them. Where
the text said little (`evidence`), later chunks of 32 tokens or more may still bring the feedback,
which only the encoder sees.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calibration import GROUP_TOKENS, QueryStatistics, calibrate_layer, evidence

if TYPE_CHECKING:
    from ..cache import PagedCache
    from .columns import Step
    from .shared import Shared


class Measuring:
    """The statistics of one layer until it is calibrated; is_first: of the packed layers."""

    def __init__(self, shared: Shared, is_first: bool) -> None:
        self._shared, self._is_first = shared, is_first
        self._queries = QueryStatistics()

    def observe(self, paged: PagedCache, query: Tensor, step: Step) -> None:
        """Adds Q [batch, q_heads, new, head_dim] of the pending tokens."""
        if paged.packed_tokens > 0 and query.shape[2] < GROUP_TOKENS:
            return
        for row, q in enumerate(query.transpose(1, 2)):
            self._queries.observe(q if step.real is None else q[step.real[row]])

    def measure(self, paged: PagedCache, k_rows: Tensor, v_rows: Tensor, starts: list[int]) -> bool:
        """Calibrates `paged` before these rows are packed; whether nothing is left to measure."""
        known = [0] * paged.batch if paged.packed_tokens > 0 else paged.lengths
        new = [end - start for start, end in itertools.pairwise(starts)]
        if max(a + b for a, b in zip(known, new, strict=True)) < GROUP_TOKENS:
            return False
        keys, values = (
            [
                torch.cat([paged.exact_rows(row, side), rows[starts[row] : starts[row + 1]]])
                if known[row]
                else rows[starts[row] : starts[row + 1]]
                for row in range(paged.batch)
            ]
            for side, rows in enumerate((k_rows, v_rows))
        )
        queries, self._queries = self._queries, QueryStatistics()
        # What the layers before could not tell apart, this one cannot either.
        before = 1.0 if self._is_first else self._shared.evidence
        weight = self._shared.evidence = min(before, evidence(values))
        balance = None
        if paged.packed_tokens > 0:
            balance = (
                torch.ones_like(keys[0][0]).float() if paged.balance is None else paged.balance
            )
        found = calibrate_layer(keys, queries, weight, balance)
        if found is None:
            return False  # `append` is about to refuse these tokens
        if balance is None:
            paged.calibration = found
        else:
            paged.feedback = found.feedback
        return weight == 1.0
