# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Columns and tokens of a padded batch.

transformers counts columns: a row of a batch of prompts has as many as the longest prompt, some of
them padding. The packed cache stores tokens: padding is dropped, so that a row packs to the same
bytes in every batch. The attention mask is the only place that says which columns are tokens, and
it must say nothing else: a query over packed history sees all earlier tokens of its row.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What a forward pass adds to a cache, the same for all its layers.

    columns: bool [batch, columns], the stored columns after the step; None: all are.
    real: bool [batch, queries], the new columns that are tokens; None: all are.
    rows: int64 [tokens], their indices in the flattened [batch * queries]; None: all.
    query_start: [batch + 1] offsets of each row's tokens in `rows`; None: equal counts.
    sliding_window: newest tokens a query may see over history, itself included; 0: all.
    causal: whether that is all the mask says over history, so that the kernels can follow it.
    """

    columns: Tensor | None = None
    real: Tensor | None = None
    rows: Tensor | None = None
    query_start: list[int] | None = None
    sliding_window: int = 0
    causal: bool = True


ALL_REAL = Step()


class NotCausalError(NotImplementedError):
    """A mask over packed history that kernels cannot express; `step`: what the pass stores."""

    def __init__(self, message: str, step: Step) -> None:
        super().__init__(message)
        self.step = step


def row_list(indices: Tensor) -> list[int]:
    """Row numbers of integer indices or of a bool mask [batch]."""
    flat = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
    rows: list[int] = flat.tolist()
    return rows


def unmasked_step(columns: Tensor | None, batch: int, queries: int) -> Step:
    """The step of a pass whose mask nobody showed us: every new column is a token."""
    if columns is None:
        return ALL_REAL
    return Step(columns=torch.cat([columns, columns.new_ones(batch, queries)], dim=1))


class StepMemo:
    """Remembers the analysis of a mask: the layers of a forward pass share the mask tensor."""

    def __init__(self) -> None:
        self._mask: weakref.ref[Tensor] | None = None
        self._columns: Tensor | None = None
        self._key: tuple[int, ...] = ()
        self._step = ALL_REAL

    def step(
        self,
        mask: Tensor | None,
        columns: Tensor | None,
        shape: tuple[int, int],
        history: int,
        sliding_window: int,
    ) -> Step:
        """`analyse`, once per mask object and history."""
        if mask is None and columns is None:
            return ALL_REAL
        key = (*shape, history, sliding_window)
        known = self._mask is not None and mask is not None and self._mask() is mask
        if known and self._columns is columns and self._key == key:
            return self._step
        step = analyse(mask, columns, shape, history, sliding_window)
        if mask is not None:
            self._mask, self._columns, self._key = weakref.ref(mask), columns, key
            self._step = step
        return step

    def __deepcopy__(self, memo: object) -> StepMemo:
        return StepMemo()


def analyse(
    mask: Tensor | None,
    columns: Tensor | None,
    shape: tuple[int, int],
    history: int,
    sliding_window: int = 0,
) -> Step:
    """Reads the tokens of a step off its attention mask.

    mask: bool or additive [batch or 1, 1, queries, history + queries], or None (causal).
    columns: the stored columns of the history, or None (all). shape: (batch, queries).
    A new column is a token if it may see itself. A prompt (history 0) may have any mask; over
    history it must be causal among tokens, possibly cut to the model's `sliding_window` (which some
    models name on layers that see everything: the mask decides), else NotCausalError.
    """
    batch, queries = shape
    if mask is None:
        if columns is not None:
            raise ValueError(
                "this cache holds a padded batch, but no attention_mask came with the new tokens; "
                f"pass the mask of all {history + queries} columns"
            )
        return ALL_REAL
    allowed = _as_bool(mask, batch, queries, history + queries)
    real = allowed[:, :, history:].diagonal(dim1=1, dim2=2)
    past = allowed.new_ones(batch, history) if columns is None else columns
    after = torch.cat([past, real], dim=1)
    step = ALL_REAL
    if not bool(real.all()):
        starts = [0, *real.sum(1).cumsum(0).tolist()]
        step = Step(after, real, real.flatten().nonzero().squeeze(1), starts)
    elif columns is not None:
        step = Step(columns=after)
    window = _check_causal(allowed, after, step, real, sliding_window) if history else 0
    return replace(step, sliding_window=window) if window else step


def _as_bool(mask: Tensor, batch: int, queries: int, columns: int) -> Tensor:
    """[batch, queries, columns], True where the query may look."""
    if mask.dim() != 4 or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (queries, columns):
        raise NotImplementedError(
            f"attention mask of shape {list(mask.shape)}: the packed cache reads masks of shape "
            f"[batch, 1, {queries}, {columns}], the same for all heads"
        )
    if mask.dtype != torch.bool:
        low = torch.finfo(mask.dtype).min / 2
        if not bool(((mask == 0) | (mask <= low)).all()):
            raise NotImplementedError(
                "additive attention mask with values between 0 and minus infinity: a bias on "
                "packed tokens is not supported"
            )
        mask = mask == 0
    return mask[:, 0].expand(batch, -1, -1)


def _check_causal(
    allowed: Tensor, after: Tensor, step: Step, real: Tensor, sliding_window: int
) -> int:
    """The window (0: none) with which every real query sees exactly the tokens up to itself."""
    history = after.shape[1] - real.shape[1]
    position = torch.arange(after.shape[1], device=after.device)
    expected = after[:, None, :] & (position[None, :] <= position[history:, None])
    wrong = _rows_that_differ(expected, allowed, real)
    if sliding_window and bool(wrong.any()):
        token = after.cumsum(1)
        expected = expected & (token[:, None, :] > token[:, history:, None] - sliding_window)
        wrong = _rows_that_differ(expected, allowed, real)
    else:
        sliding_window = 0
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise NotCausalError(
            f"the attention mask of batch row {row} is not causal over the cached tokens (for "
            "example bidirectional image blocks, packed documents, or tokens that were masked "
            "after they were cached): new tokens over packed history must see exactly the earlier "
            "tokens of their row",
            replace(step, causal=False),
        )
    return sliding_window


def _rows_that_differ(expected: Tensor, allowed: Tensor, real: Tensor) -> Tensor:
    """bool [batch]: whether a real query of the row may look elsewhere than expected."""
    return ((expected != allowed) & real[:, :, None]).flatten(1).any(1)
