# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""OscarLayer: one decoder layer of the cache.

The tokens of the running forward pass are *pending* (dense, exact) until they are committed to the
packed cache: by the attention function right after it has used them, else by the next update.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..cache import PagedCache
from .columns import Step, row_list, unmasked_step
from .handle import Handle
from .measuring import Measuring
from .shared import Shared


def token_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """x [batch, heads, queries, head_dim] as [tokens, heads, head_dim], a view where possible."""
    batch, _, queries, _ = x.shape
    if queries == 1:
        flat = x.select(2, 0)
    elif batch == 1:
        flat = x.select(0, 0).transpose(0, 1)
    else:
        flat = x.transpose(1, 2).flatten(0, 1)
    return flat if rows is None else flat.index_select(0, rows)


class OscarLayer(CacheLayerMixin):  # type: ignore[misc]
    """Packed K and V of one layer, as transformers' cache classes expect a layer.

    Lengths here are columns as transformers counts them; `paged` stores the columns that are
    tokens (see columns.py).
    """

    is_compileable = False
    is_croppable = True  # within the exact window
    is_sliding = False
    supports_early_init = True

    def __init__(self, index: int, shared: Shared) -> None:
        self.index = index
        self.shared = shared
        self.version = 0  # changes whenever handles become stale
        self._clear()

    def _clear(self) -> None:
        self.paged: PagedCache | None = None
        self.length = 0  # committed columns
        self.columns: Tensor | None = None  # bool [batch, length], None: every column is a token
        self.pending: tuple[Tensor, Tensor] | None = None  # [batch, kv_heads, new, head_dim]
        self.step: Step | None = None  # of the pending tokens, once the mask is known
        self.measuring: Measuring | None = None  # until the layer is calibrated
        self._dense: dict[int, Tensor] = {}
        self.version += 1

    # -- state ---------------------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:
        """Whether the first K and V have come."""
        return self.paged is not None

    @property
    def batch_size(self) -> int:
        """Sequences, -1 before the first update."""
        return -1 if self.paged is None else self.paged.batch

    @property
    def keys(self) -> Tensor | None:
        """A handle on K, for code that reads a layer's tensors."""
        return self._handle(0)

    @property
    def values(self) -> Tensor | None:
        """A handle on V."""
        return self._handle(1)

    def _handle(self, part: int) -> Tensor | None:
        paged = self.paged
        if paged is None:
            return None
        like = torch.empty(0, dtype=paged.dtype, device=self.device)
        shape = (paged.batch, paged.kv_heads, self.get_seq_length(), paged.head_dim)
        return Handle.make(self, part, shape, like)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Builds the packed cache for K (and V) of shape [batch, kv_heads, tokens, head_dim]."""
        batch, kv_heads, _, head_dim = key_states.shape
        known = self.shared.given.get(self.index)
        balance = None if known is None else known.balance
        if balance is not None and tuple(balance.shape) != (kv_heads, head_dim):
            raise ValueError(
                f"layer {self.index}: balance has shape {list(balance.shape)}, "
                f"K has [kv_heads, head_dim] = [{kv_heads}, {head_dim}]"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.paged = PagedCache(
            batch,
            kv_heads,
            head_dim,
            key_states.dtype,
            format=self.shared.format,
            window=self.shared.window,
            sinks=self.shared.sinks,
            calibration=known,
            device=key_states.device,
        )
        if known is None and self.shared.measure:
            self.measuring = Measuring(self.shared, self.index == self.shared.first)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Columns, pending ones and padding included."""
        return self.length + (0 if self.pending is None else self.pending[0].shape[2])

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(columns a mask must have, offset of the first); older releases pass the positions."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    get_max_cache_shape = get_max_length

    # -- growing -------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes K and V [batch, kv_heads, new, head_dim] as pending; returns handles on all K, V.

        Raises ValueError for another batch size, other shapes than before, K and V of different
        shape, and after a layer refused tokens (the layers would no longer agree).
        """
        if self.shared.refused:
            raise ValueError(
                f"this cache is incomplete, use a new one or reset(): {self.shared.refused}"
            )
        self._check_shapes(key_states, value_states)
        if self.pending is not None:
            self.commit()
        if self.paged is None:
            self.lazy_initialization(key_states, value_states)
        if self._dense:
            self._dense = {}
        self.pending = (key_states, value_states)
        self.step = None
        self.version += 1
        batch, kv_heads, new, head_dim = key_states.shape
        shape = (batch, kv_heads, self.length + new, head_dim)
        return (
            Handle.make(self, 0, shape, key_states),
            Handle.make(self, 1, shape, value_states),
        )

    def _check_shapes(self, k: Tensor, v: Tensor) -> None:
        if k.shape != v.shape:
            raise ValueError(
                f"layer {self.index}: K {list(k.shape)} and V {list(v.shape)} differ in shape; "
                "models that cache latents (MLA) are not supported"
            )
        paged = self.paged
        if paged is None:
            return
        if k.shape[0] != paged.batch:
            raise ValueError(
                f"layer {self.index}: this cache holds a batch of {paged.batch}, got K of batch "
                f"{k.shape[0]}; use a new cache or reset()"
            )
        if (k.shape[1], k.shape[3]) != (paged.kv_heads, paged.head_dim):
            raise ValueError(
                f"layer {self.index}: expected K [{paged.batch}, {paged.kv_heads}, tokens, "
                f"{paged.head_dim}], got {list(k.shape)}"
            )

    def commit(self) -> None:
        """Appends the pending tokens to the packed cache; nothing to do if there are none.

        Raises ValueError for K or V that are not finite: the layer keeps what it held before.
        """
        if self.pending is None or self.paged is None:
            return
        k, v = self.pending
        step = self.step or unmasked_step(self.columns, k.shape[0], k.shape[2])
        self.pending = self.step = None
        rows, starts = step.rows, step.query_start
        if k.requires_grad or v.requires_grad:
            k, v = k.detach(), v.detach()
        k_rows, v_rows = token_rows(k, rows), token_rows(v, rows)
        self.measure(k_rows, v_rows, starts)
        try:
            self.paged.append(k_rows, v_rows, starts)
        except ValueError as error:
            self._refuse(error)
        self.length += k.shape[2]
        self.columns = step.columns

    def check(self) -> None:
        """Waits for the GPU; ValueError if an append was given what it could not store."""
        if self.paged is None:
            return
        try:
            self.paged.check()
        except ValueError as error:
            self._refuse(error)

    def _refuse(self, error: ValueError) -> NoReturn:
        self.version += 1
        self.shared.refused = f"layer {self.index}: {error}"
        raise ValueError(self.shared.refused) from error

    def observe(self, query: Tensor, step: Step) -> None:
        """Adds Q [batch, q_heads, new, head_dim] of the pending tokens to what is measured."""
        if self.measuring is not None and self.paged is not None:
            self.measuring.observe(self.paged, query, step)

    def measure(self, k_rows: Tensor, v_rows: Tensor, starts: list[int] | None) -> None:
        """Calibrates the layer, unless it is, once the first tile is about to be packed."""
        if self.measuring is None or self.paged is None:
            return
        if starts is None:
            starts = _equal_split(self.paged.batch, k_rows.shape[0])
        if self.measuring.measure(self.paged, k_rows, v_rows, starts):
            self.measuring = None

    # -- reading dense -------------------------------------------------------------------------

    def dense(self, part: int) -> Tensor:
        """K (0) or V (1) as [batch, kv_heads, columns, head_dim]: the slow way to read.

        Both come out of one dequantisation; the other one is kept until it is asked for.
        """
        known = self._dense.pop(part, None)
        if known is not None:
            return known
        paged = self.paged
        assert paged is not None
        pending = self.pending
        if self.length == 0 and pending is not None:
            return pending[part]
        self.shared.dequantizations += 1
        _warn_dense()
        both = [self._to_columns(x) for x in paged.dequantize()]
        if pending is not None:
            both = [
                torch.cat([x, new.to(x.dtype)], 2) for x, new in zip(both, pending, strict=True)
            ]
        self._dense = {1 - part: both[1 - part]}
        return both[part]

    def _to_columns(self, x: Tensor) -> Tensor:
        """Left-aligned tokens to columns; columns of padding are 0."""
        if self.columns is None:
            return x
        source = (self.columns.cumsum(1) - 1).clamp(min=0)[:, None, :, None]
        gathered = x.gather(2, source.expand(-1, x.shape[1], -1, x.shape[3]))
        return gathered.masked_fill_(~self.columns[:, None, :, None], 0)

    # -- changing ------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets all tokens, and what was measured on them; a calibration that was given stays."""
        self._clear()
        self.shared.refused = ""

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest -tokens_to_remove columns (the argument is zero or negative).

        Raises ValueError beyond the exact window, unless all columns go.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove")
        if tokens_to_remove == 0 or self.paged is None:
            return
        self.commit()
        count = -tokens_to_remove
        if count >= self.length:
            self._clear()
            return
        removed = count
        if self.columns is not None:
            per_row = self.columns[:, -count:].sum(1).tolist()
            if len(set(per_row)) > 1:
                raise ValueError(
                    f"crop({tokens_to_remove}): the rows of this padded batch would lose different "
                    f"numbers of tokens {per_row}"
                )
            removed = per_row[0]
        self.paged.crop(removed)
        if self.columns is not None:
            self.columns = self.columns[:, :-count]
        self.length -= count
        self._touch()

    def select(self, indices: list[int], columns: Tensor | None) -> None:
        """Row i becomes old row indices[i]; columns: the record of stored columns afterwards."""
        if self.paged is None:
            return
        self.commit()
        self.paged.select(indices)
        self.columns = columns
        self._touch()

    def _select_rows(self, indices: list[int]) -> None:
        self.commit()
        self.select(indices, None if self.columns is None else self.columns[indices])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes old row beam_idx[i]."""
        self._select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._select_rows([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices` (integers or bool [batch])."""
        self._select_rows(row_list(indices))

    def _touch(self) -> None:
        self._dense = {}
        self.version += 1

    def activate_past_recording(self) -> None:
        """Nothing to do: the exact window always allows a crop."""

    def offload(self) -> None:
        """Refused: packed pages stay where they are."""
        raise NotImplementedError("a packed cache layer cannot be offloaded")

    prefetch = offload

    def __repr__(self) -> str:
        return f"OscarLayer({self.index}, batch={self.batch_size}, columns={self.get_seq_length()})"


def _equal_split(batch: int, tokens: int) -> list[int]:
    return [row * (tokens // batch) for row in range(batch + 1)]


_warned = False


def _warn_dense() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "the packed KV cache is being dequantised for an operation that cannot read it "
            "(attention of a model without oscar_kv.enable, a mask over history that is not "
            "causal): results are right, but slow.",
            UserWarning,
            stacklevel=3,
        )
