# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""PagedCache: the packed K and V of one layer for a ragged batch of sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _core, ops
from .calibration import Calibration, calibration_part
from .device import FaultWord, usable_device
from .plan import SharedPlans, StepPlans
from .pool import PagePool

TILE_TOKENS = 32
_TABLE_STEP = 16  # columns by which the block table grows
_ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PagedCache:
    """Pages, block table, ring and sinks of one layer; a step is ``attend``, then ``append``.

    ``batch`` sequences of ``kv_heads`` KV heads and ``head_dim`` channels; ``dtype`` is that of the
    exact copies (the model's). ``calibration``: what packing follows; ``balance`` alone stands for
    a calibration that has nothing else. Raises ValueError, TypeError or NotImplementedError for
    what it cannot hold.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        format: str = "k2v2",
        window: int = 32,
        sinks: int = 4,
        page_tokens: int = 128,
        balance: Tensor | None = None,
        calibration: Calibration | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or kv_heads < 1:
            raise ValueError(f"batch is {batch} and kv_heads {kv_heads}, both must be at least 1")
        if dtype not in _ROW_DTYPES:
            raise TypeError(f"dtype is {dtype}, must be float32, float16 or bfloat16")
        self.device = usable_device(device)
        if page_tokens < TILE_TOKENS or page_tokens % TILE_TOKENS:
            raise ValueError(
                f"page_tokens is {page_tokens}, must be a positive multiple of {TILE_TOKENS}"
            )
        if window < 0:
            raise ValueError(f"window is {window}, must be 0 or more")
        if not 0 <= sinks <= TILE_TOKENS:
            raise ValueError(f"sinks is {sinks}, must be 0 to {TILE_TOKENS}")
        tile_bytes = _core.tile_bytes(head_dim, format)
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self.format, self.window, self.sinks = format, window, sinks
        self.page_tokens = page_tokens
        self.ring_tokens = _core.ring_tokens(window)
        self._pool_shape = (kv_heads, page_tokens // TILE_TOKENS, tile_bytes)
        self._calibration = Calibration()
        self._fixed = self._calibration.arrays()
        self._clear(batch)
        self.calibration = calibration or Calibration(balance=balance)

    def _clear(self, batch: int) -> None:
        rows = self.ring_tokens + self.sinks
        self.batch = batch
        self.pool = PagePool(*self._pool_shape, device=self.device)
        self.exact = torch.zeros(
            (batch, 2, self.kv_heads, rows, self.head_dim), dtype=self.dtype, device=self.device
        )
        self.slot = torch.arange(batch, dtype=torch.int32, device=self.device)
        self._fault = FaultWord(self.device) if self.device.type == "cuda" else None
        self.lengths = [0] * batch
        self.exact_start = [0] * batch
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self.block_table = self._int32([[0] * _TABLE_STEP] * batch)
        self._starts: dict[int, Tensor] = {}
        self.seq_len = self._int32(self.lengths)
        self.exact_from = self._int32(self.exact_start)
        self._handed_over: tuple[Tensor, _core.CacheArrays] | None = None

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device, non_blocking=True)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles hold their own tensors: the handed-over addresses are not theirs.
        return {**self.__dict__, "_handed_over": None}

    @property
    def calibration(self) -> Calibration:
        """What packing follows; balance and center are fixed once tokens are packed with them."""
        return self._calibration

    @calibration.setter
    def calibration(self, value: Calibration) -> None:
        value = value.checked(self.kv_heads, self.head_dim, self.device)
        for name in value.differs(self._calibration) if self.packed_tokens > 0 else ():
            if name != "feedback":
                raise ValueError(
                    f"{name} cannot change once tokens are packed with it "
                    f"({self.packed_tokens} are)"
                )
        self._calibration, self._fixed = value, value.arrays()
        self._handed_over = None

    balance = calibration_part("balance")
    center = calibration_part("center")
    feedback = calibration_part("feedback")

    @property
    def packed_tokens(self) -> int:
        """Largest number of packed tokens of a sequence (all complete tiles)."""
        return max(self.lengths) // TILE_TOKENS * TILE_TOKENS

    def append(self, k: Tensor, v: Tensor, query_start: Sequence[int] | None = None) -> None:
        """Adds k, v ``[tokens, kv_heads, head_dim]``; query_start None: equal counts."""
        self._add_lengths(self._append(k, v, query_start, "both"))

    def _append(
        self, k: Tensor, v: Tensor, query_start: Sequence[int] | None, part: str
    ) -> list[int]:
        if self._fault is not None:
            self._fault.check()
        start, counts = self._split(k, query_start)
        self._check_rows(k=k, v=v)
        self._make_room(counts)
        options = (self.format, self.window, self.sinks, part)
        ops.append_to(self._arrays(), k, v, start, *options, fault=self._fault)
        return counts

    def check(self) -> None:
        """Waits for the device; ValueError if an append was given what it could not store.

        On the CPU `append` itself raises. On a CUDA device a NaN, an infinity or a magnitude beyond
        65504 in K or V is found while the kernel runs, and raised by the next append or by this.
        """
        if self._fault is not None:
            torch.cuda.current_stream(self.device).synchronize()
            self._fault.check()

    def reserve(self, tokens: int) -> None:
        """Takes pages for `tokens` tokens of every sequence now.

        Until a sequence is longer, no append changes the address of an array: a CUDA graph that
        holds ``append`` and ``attend`` of this cache can be replayed. Count its tokens with
        ``replayed``.
        """
        self._make_room([max(tokens - length, 0) for length in self.lengths])

    def replayed(self, tokens: int) -> None:
        """Says that a CUDA graph holding one append was replayed: `tokens` more a sequence."""
        self.lengths = [length + tokens for length in self.lengths]

    def attend(
        self,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        query_start: Sequence[int] | None = None,
        *,
        scale: float,
        softcap: float = 0.0,
        sliding_window: int = 0,
        sink_logits: Tensor | None = None,
        strict: bool = False,
        plans: SharedPlans | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of q ``[tokens, q_heads, head_dim]`` over the cache and k_new, v_new.

        Query i of a sequence of L cached tokens is at position L + i. Returns the output (shape and
        dtype of q) and the natural log-sum-exp ``[tokens, q_heads]``. Changes nothing that can be
        read: call ``append`` with k_new, v_new afterwards. strict: every query reads what it would
        read if the tokens came one by one; the tiles that k_new, v_new complete are packed first.
        plans: what the caches of a model's layers share on a CUDA device (plan.py).
        """
        if strict:
            self._append(k_new, v_new, query_start, "pack")
        start, counts = self._split(q, query_start)
        layout = (self.format, self.window, self.sinks)
        plan = None
        if plans is not None and self.device.type == "cuda":
            known = (self.block_table.shape, self.lengths, self.exact_start, counts)
            given = (self._arrays(), self._pool_shape, q, start, layout)
            step = StepPlans(plans, tuple(map(tuple, known)), self)
            plan = step.of(*given, sliding_window, strict, max(counts))
        return ops.attend_over(
            *(self._arrays(), q, k_new, v_new, start),
            *(*layout, scale, softcap, sliding_window, sink_logits, strict),
            max_query_len=max(counts),
            plan=plan,
        )

    def crop(self, tokens: int) -> None:
        """Forgets the newest `tokens` of every sequence; ValueError beyond what the ring restores.

        `window` tokens can always be removed. Tokens whose ring copy is gone are read packed.
        """
        if tokens == 0:
            return
        held = [self._oldest_exact(row) for row in range(self.batch)]
        for row, length in enumerate(self.lengths):
            # The tile that becomes open has to be whole in the ring, to be packed again.
            limit = length - -(-held[row] // TILE_TOKENS) * TILE_TOKENS
            if not 0 <= tokens <= limit:
                raise ValueError(
                    f"crop: tokens is {tokens}, must be 0 to {limit} for sequence {row} of "
                    f"{length} tokens (window {self.window}): older tokens are only packed"
                )
        self.exact_start = held
        self.lengths = [length - tokens for length in self.lengths]
        for row, pages in enumerate(self._pages):
            keep = self._pages_for(self.lengths[row])
            for page in pages[keep:]:
                self.pool.release(page)
            del pages[keep:]
        self._trim()
        self.seq_len.copy_(self._int32(self.lengths))
        self.exact_from.copy_(self._int32(self.exact_start))

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes old sequence ``indices[i]``; shared pages are copied when written."""
        indices = [int(index) for index in indices]
        for index in indices:
            if not 0 <= index < self.batch:
                raise IndexError(f"select: index is {index}, must be 0 to {self.batch - 1}")
        if not indices:
            raise ValueError("select: indices is empty, at least one sequence must stay")
        if indices == list(range(self.batch)):
            return
        selected = [list(self._pages[index]) for index in indices]
        for pages in selected:
            for page in pages:
                self.pool.retain(page)
        for pages in self._pages:
            for page in pages:
                self.pool.release(page)
        self._pages = selected
        self.exact = self.exact[torch.tensor(indices).to(self.device)]
        self.batch = len(indices)
        self.slot = torch.arange(self.batch, dtype=torch.int32, device=self.device)
        self.lengths = [self.lengths[index] for index in indices]
        self.exact_start = [self.exact_start[index] for index in indices]
        self._starts = {}
        self._trim()
        self.seq_len = self._int32(self.lengths)
        self.exact_from = self._int32(self.exact_start)
        self._publish_pages()

    def reset(self) -> None:
        """Forgets all tokens and frees all pages; the calibration stays."""
        self._clear(self.batch)

    def memory(self) -> dict[str, int]:
        """Resident bytes: the storages that this object holds, unused pages included."""
        tables = [self.block_table, self.slot, self.seq_len, self.exact_from]
        tables += [x for x in (self.center, *self._fixed) if x is not None]
        return {
            "packed": self.pool.nbytes,
            "exact": self.exact.untyped_storage().nbytes(),
            "tables": sum(table.untyped_storage().nbytes() for table in tables),
        }

    def exact_rows(self, row: int, side: int) -> Tensor:
        """K (side 0) or V (1) of sequence `row` in the ring, oldest first, ``[tokens, kv_heads,
        head_dim]``."""
        positions = torch.arange(self._oldest_exact(row), self.lengths[row], device=self.device)
        return self.exact[row, side, :, positions % self.ring_tokens].transpose(0, 1)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, kv_heads, max(lengths), head_dim]`` as the next query reads them.

        Rows beyond a sequence's length are 0. Slow: for fallbacks and tests.
        """
        shape = (self.batch, self.kv_heads, max(self.lengths), self.head_dim)
        k, v = torch.zeros(shape), torch.zeros(shape)
        arrays = (
            self._arrays()
            if self.device.type == "cpu"
            else _core.CacheArrays(
                *(None if tensor is None else tensor.cpu() for tensor in self._tensors())
            )
        )
        _core.dequantize(arrays, k, v, self.format, self.window, self.sinks)
        return k.to(self.device, self.dtype), v.to(self.device, self.dtype)

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.pool.storage,
            self.exact,
            self.block_table,
            self.slot,
            self.seq_len,
            self.exact_from,
            *self._fixed,
        )

    def _arrays(self) -> _core.CacheArrays:
        if self._handed_over is None or self._handed_over[0] is not self.pool.storage:
            with ops.current_device(self.device):
                arrays = _core.CacheArrays(*self._tensors())
            self._handed_over = (self.pool.storage, arrays)
        return self._handed_over[1]

    def _split(self, rows: Tensor, query_start: Sequence[int] | None) -> tuple[Tensor, list[int]]:
        tokens = rows.shape[0]
        if query_start is not None:
            if len(query_start) != self.batch + 1:
                raise ValueError(
                    f"query_start has {len(query_start)} entries, must have {self.batch + 1} "
                    f"(this cache holds {self.batch} sequences)"
                )
            counts = [b - a for a, b in itertools.pairwise(query_start)]
            return self._int32(list(query_start)), counts
        if tokens % self.batch:
            raise ValueError(
                f"{tokens} tokens are not a multiple of {self.batch} sequences: give query_start"
            )
        count = tokens // self.batch
        if count not in self._starts:
            starts = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
            self._starts = {count: starts * count}
        return self._starts[count], [count] * self.batch

    def _check_rows(self, **rows: Tensor) -> None:
        # Checked before pages are taken, so that a refused call leaves the pool as it was.
        for name, tensor in rows.items():
            if tensor.device != self.device:
                raise TypeError(f"{name} is on {tensor.device}, must be on {self.device}")
            if tensor.dtype not in _ROW_DTYPES:
                raise TypeError(
                    f"{name} has dtype {tensor.dtype}, must be float32, float16 or bfloat16"
                )
            if tensor.dim() != 3 or tuple(tensor.shape[1:]) != (self.kv_heads, self.head_dim):
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}, must be "
                    f"[tokens, {self.kv_heads}, {self.head_dim}]"
                )

    def _pages_for(self, length: int) -> int:
        return -(-(length // TILE_TOKENS * TILE_TOKENS) // self.page_tokens)

    def _make_room(self, counts: list[int]) -> None:
        changed = False
        for row, count in enumerate(counts):
            first, last = self.lengths[row], self.lengths[row] + count
            if first // TILE_TOKENS == last // TILE_TOKENS:
                continue
            pages, needed = self._pages[row], self._pages_for(last)
            self.pool.reserve(needed - len(pages))
            for index in range(first // TILE_TOKENS * TILE_TOKENS // self.page_tokens, needed):
                if index >= len(pages):
                    pages.append(self.pool.allocate())
                    changed = True
                elif self.pool.shared(pages[index]):
                    pages[index] = self.pool.writable(pages[index])
                    changed = True
        if changed:
            self._publish_pages()

    def _oldest_exact(self, row: int) -> int:
        return max(self.exact_start[row], self.lengths[row] - self.ring_tokens, 0)

    def _trim(self) -> None:
        moved = self.pool.trim()
        if moved is None:
            return
        self._pages = [[moved[page] for page in pages] for pages in self._pages]
        self._publish_pages()

    def _add_lengths(self, counts: list[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        # In place: the arrays stay handed over from step to step, and a CUDA graph holds the sum.
        if len(set(counts)) == 1:
            self.seq_len.add_(counts[0])
        else:
            self.seq_len.copy_(self._int32(self.lengths))

    def _publish_pages(self) -> None:
        self._handed_over = None
        widest = max(len(pages) for pages in self._pages)
        columns = max(_TABLE_STEP, -(-widest // _TABLE_STEP) * _TABLE_STEP)
        padded = [pages + [0] * (columns - len(pages)) for pages in self._pages]
        self.block_table = self._int32(padded)
