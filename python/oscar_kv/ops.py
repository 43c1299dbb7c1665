# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The two operations as ``torch.library`` ops: ``oscar_kv::append`` and ``oscar_kv::attend``.

Shapes (one layer; ``include/oscar/cache.hpp`` has the meaning of each):

* ``pages`` uint8 ``[num_pages, kv_heads, page_tokens / 32, tile_bytes]``
* ``exact`` model dtype ``[slots, 2, kv_heads, ring_tokens(window) + sinks, head_dim]``
* ``block_table`` int32 ``[batch, max_pages]``
* ``slot``, ``seq_len``, ``exact_from`` (or None) int32 ``[batch]``
* ``balance`` float32 ``[kv_heads, head_dim]`` or None
* ``k``, ``v``, ``k_new``, ``v_new`` ``[tokens, kv_heads, head_dim]`` and ``q``
  ``[tokens, q_heads, head_dim]``: float32, float16 or bfloat16, head_dim contiguous
* ``query_start`` int32 ``[batch + 1]``: tokens ``query_start[b] .. query_start[b + 1] - 1`` belong
  to sequence ``b``

``append`` writes ``pages`` and ``exact`` and leaves ``seq_len`` to the caller. ``attend`` returns
the output ``[tokens, q_heads, head_dim]`` in q's dtype and the natural log-sum-exp
``[tokens, q_heads]`` float32.

Errors: TypeError for a dtype or device, ValueError for a shape, stride or value (NaN and infinity
in K or V among them), IndexError for a block-table entry or too few pages, NotImplementedError for
a head_dim that has no format. The message names the argument, its value and the limit; nothing is
written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _core

_LIBRARY = torch.library.Library("oscar_kv", "DEF")
_LIBRARY.define(
    "append(Tensor(a!) pages, Tensor(b!) exact, Tensor block_table, Tensor slot, Tensor seq_len,"
    " Tensor? exact_from, Tensor? balance, Tensor k, Tensor v, Tensor query_start, str format,"
    " int window, int sinks, str part) -> ()"
)
_LIBRARY.define(
    "attend(Tensor q, Tensor k_new, Tensor v_new, Tensor pages, Tensor exact, Tensor block_table,"
    " Tensor slot, Tensor seq_len, Tensor? exact_from, Tensor? balance, Tensor query_start,"
    " str format, int window, int sinks, float scale, float softcap, int sliding_window,"
    " Tensor? sink_logits, bool strict) -> (Tensor out, Tensor lse)"
)


def _detached(tensor: Tensor) -> Tensor:
    # DLPack refuses tensors that require grad; these ops have no backward.
    return tensor.detach() if tensor.requires_grad else tensor


@torch.library.impl(_LIBRARY, "append", "CPU")
def _append_cpu(
    pages: Tensor,
    exact: Tensor,
    block_table: Tensor,
    slot: Tensor,
    seq_len: Tensor,
    exact_from: Tensor | None,
    balance: Tensor | None,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    *options: str | int,  # format, window, sinks, part
) -> None:
    arrays = _core.CacheArrays(pages, exact, block_table, slot, seq_len, exact_from, balance)
    append_to(arrays, k, v, query_start, *options)


@torch.library.impl(_LIBRARY, "attend", "CPU")
def _attend_cpu(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    pages: Tensor,
    exact: Tensor,
    block_table: Tensor,
    slot: Tensor,
    seq_len: Tensor,
    exact_from: Tensor | None,
    balance: Tensor | None,
    query_start: Tensor,
    *options: Any,  # format, window, sinks, scale, softcap, sliding_window, sink_logits, strict
) -> tuple[Tensor, Tensor]:
    arrays = _core.CacheArrays(pages, exact, block_table, slot, seq_len, exact_from, balance)
    return attend_over(arrays, q, k_new, v_new, query_start, *options)


def append_to(
    arrays: _core.CacheArrays, k: Tensor, v: Tensor, query_start: Tensor, *options: Any
) -> None:
    """``append`` on arrays that were handed over before: saves their conversion at every step."""
    _core.append(arrays, _detached(k), _detached(v), query_start, *options)


def attend_over(
    arrays: _core.CacheArrays,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    query_start: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """``attend`` on arrays that were handed over before."""
    out, lse = _attend_outputs(q)
    size = arrays.attend_workspace_bytes(q.shape[0], q.shape[1])
    workspace = torch.empty(size, dtype=torch.uint8)
    rows = (_detached(q), _detached(k_new), _detached(v_new))
    _core.attend(arrays, *rows, query_start, out, lse, workspace, *options)
    return out, lse


@torch.library.register_fake("oscar_kv::append", lib=_LIBRARY)
def _append_fake(pages: Tensor, *arguments: object) -> None:
    _check_devices(pages, arguments)


@torch.library.register_fake("oscar_kv::attend", lib=_LIBRARY)
def _attend_fake(q: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    _check_devices(q, arguments)
    return _attend_outputs(q)


def _check_devices(first: Tensor, others: tuple[object, ...]) -> None:
    # One argument on the meta device sends the whole call here: that must not look like success.
    for other in others:
        if isinstance(other, Tensor) and other.device != first.device:
            raise ValueError(f"arguments are on {first.device} and {other.device}, must be on one")


def _attend_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    if q.dim() != 3:
        raise ValueError(f"q has shape {list(q.shape)}, must be [tokens, q_heads, head_dim]")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


append = torch.ops.oscar_kv.append.default
attend = torch.ops.oscar_kv.attend.default
