# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The two operations as ``torch.library`` ops: ``oscar_kv::append`` and ``oscar_kv::attend``.

Shapes (one layer; ``include/oscar/cache.hpp`` has the meaning of each):

* ``pages`` uint8 ``[num_pages, kv_heads, page_tokens / 32, tile_bytes]``
* ``exact`` model dtype ``[slots, 2, kv_heads, ring_tokens(window) + sinks, head_dim]``, any stride
  between slots; in 2 or 4 blocks a sequence ``[slots, 1, kv_heads, all or half of the rows,
  head_dim]``, and then ``slot`` ``[batch, blocks]``
* ``block_table`` int32 ``[batch, max_pages]``
* ``slot``, ``seq_len``, ``exact_from`` (or None) int32 ``[batch]``
* ``balance`` float32 ``[kv_heads, head_dim]`` or None
* ``feedback`` float16 ``[kv_heads, head_dim, head_dim]`` or None (feedback.py)
* ``center`` float32 ``[kv_heads, head_dim]`` or None, in the rotated basis (rotate.py)
* ``k``, ``v``, ``k_new``, ``v_new`` ``[tokens, kv_heads, head_dim]`` and ``q``
  ``[tokens, q_heads, head_dim]``: float32, float16 or bfloat16, head_dim contiguous
* ``query_start`` int32 ``[batch + 1]``: tokens ``query_start[b] .. query_start[b + 1] - 1`` belong
  to sequence ``b``

``append`` writes ``pages`` and ``exact`` and leaves ``seq_len`` to the caller. ``attend`` returns
the output ``[tokens, q_heads, head_dim]`` in q's dtype and the natural log-sum-exp
``[tokens, q_heads]`` float32.

All tensors of a call are on one device. On a CUDA device the calls only launch kernels on torch's
current stream, and can be captured in a CUDA graph. ``max_query_len`` is a bound of one sequence's
query tokens (0: not known); up to 8 only the decode kernel is launched. What only the contents of
tensors can show is then the caller's duty (block-table entries, lengths), and NaN or infinity in K
or V is an error of a later ``append`` on that device.

Errors: TypeError for a dtype or device, ValueError for a shape, stride or value (NaN and infinity
in K or V among them), IndexError for a block-table entry or too few pages, NotImplementedError for
a head_dim that has no format. The message names the argument, its value and the limit; nothing is
written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import _core
from .device import FaultWord

_LIBRARY = torch.library.Library("oscar_kv", "DEF")
_LIBRARY.define(
    "append(Tensor(a!) pages, Tensor(b!) exact, Tensor block_table, Tensor slot, Tensor seq_len,"
    " Tensor? exact_from, Tensor? balance, Tensor k, Tensor v, Tensor query_start, str format,"
    " int window, int sinks, str part, Tensor? feedback=None, Tensor? center=None) -> ()"
)
_LIBRARY.define(
    "attend(Tensor q, Tensor k_new, Tensor v_new, Tensor pages, Tensor exact, Tensor block_table,"
    " Tensor slot, Tensor seq_len, Tensor? exact_from, Tensor? balance, Tensor query_start,"
    " str format, int window, int sinks, float scale, float softcap, int sliding_window,"
    " Tensor? sink_logits, bool strict, int max_query_len=0, Tensor? center=None)"
    " -> (Tensor out, Tensor lse)"
)


_APPEND_OPTIONS = 4  # between query_start and feedback
_ATTEND_OPTIONS = 8  # between query_start and max_query_len


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
    *options: Any,  # format, window, sinks, part, feedback, center
) -> None:
    cache = (pages, exact, block_table, slot, seq_len, exact_from, balance)
    arrays = _core.CacheArrays(*cache, *options[_APPEND_OPTIONS:])
    append_to(arrays, k, v, query_start, *options[:_APPEND_OPTIONS])


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
    # format, window, sinks, scale, softcap, sliding_window, sink_logits, strict, max_query_len,
    # center
    *options: Any,
) -> tuple[Tensor, Tensor]:
    cache = (pages, exact, block_table, slot, seq_len, exact_from, balance)
    arrays = _core.CacheArrays(*cache, center=_attend_extras(options)[1])
    return attend_over(arrays, q, k_new, v_new, query_start, *options[:_ATTEND_OPTIONS])


_faults: dict[torch.device, FaultWord] = {}  # of the op `append`, by device


@torch.library.impl(_LIBRARY, "append", "CUDA")
def _append_cuda(pages: Tensor, *arguments: Any) -> None:
    exact, block_table, slot, seq_len, exact_from, balance, k, v, query_start, *options = arguments
    with current_device(pages.device):
        cache = (pages, exact, block_table, slot, seq_len, exact_from, balance)
        arrays = _core.CacheArrays(*cache, *options[_APPEND_OPTIONS:])
        options = options[:_APPEND_OPTIONS]
        fault = _faults.setdefault(pages.device, FaultWord(pages.device))
        try:
            fault.check()
        finally:
            fault.clear()  # said once
        append_to(arrays, k, v, query_start, *options, fault=fault)


@torch.library.impl(_LIBRARY, "attend", "CUDA")
def _attend_cuda(q: Tensor, k_new: Tensor, v_new: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    pages, exact, block_table, slot, seq_len, exact_from, balance, query_start, *options = arguments
    bound, center = _attend_extras(options)
    with current_device(q.device):
        cache = (pages, exact, block_table, slot, seq_len, exact_from, balance)
        arrays = _core.CacheArrays(*cache, center=center)
        rows = (q, k_new, v_new, query_start)
        return attend_over(arrays, *rows, *options[:_ATTEND_OPTIONS], max_query_len=bound)


def _attend_extras(options: Sequence[Any]) -> tuple[int, Tensor | None]:
    """max_query_len and center, which a call may leave out: torch then passes fewer arguments."""
    given = options[_ATTEND_OPTIONS:]
    return given[0] if given else 0, given[1] if len(given) > 1 else None


_AS_IT_IS = contextlib.nullcontext()


def current_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """`device` as torch's current one: DLPack and kernel launches ask for it."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _AS_IT_IS
    return cast("contextlib.AbstractContextManager[None]", torch.cuda.device(device))


def _stream(device: torch.device) -> int:
    """torch's current stream of a CUDA device as an integer; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    # What torch.cuda.current_stream looks up, without an object for it: twice a layer and step.
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def append_to(
    arrays: _core.CacheArrays,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    *options: Any,
    fault: FaultWord | None = None,
) -> None:
    """``append`` on arrays that were handed over before: saves their conversion at every step."""
    k, v = _readable(k), _readable(v)
    address = 0 if fault is None else fault.address
    device = k.device
    with current_device(device):
        launch: tuple[Any, ...] = (*options, _stream(device), address)
        _core.append(arrays, k, v, query_start, *launch)


def attend_over(
    arrays: _core.CacheArrays,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    query_start: Tensor,
    *options: Any,
    max_query_len: int = 0,
    plan: _core.AttendPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """``attend`` on arrays that were handed over before.

    max_query_len: a bound of one sequence's query tokens; 0: not known.
    """
    out, lse = _attend_outputs(q)
    rows = (q, k_new, v_new, query_start)
    attend_into(out, lse, arrays, *rows, *options, max_query_len=max_query_len, plan=plan)
    return out, lse


def plan_attend(
    arrays: _core.CacheArrays,
    query_start: Tensor,
    query_tokens: int,
    q_heads: int,
    format: str,
    window: int,
    sinks: int,
    *,
    sliding_window: int = 0,
    strict: bool = False,
    max_query_len: int = 0,
) -> _core.AttendPlan:
    """How a decode step on a CUDA device is cut into work, for the ``attend`` of all its layers.

    It depends on shapes, ``seq_len``, ``query_start``, ``slot`` and ``exact_from``: one plan, made
    after their last change, serves every layer that has the same, and each call starts to read 2 us
    earlier. ``attend`` refuses one of other shapes. Launches one kernel; a CUDA graph that captures
    it with the ``attend`` calls is right for every replay.
    """
    device = query_start.device
    if device.type != "cuda":
        raise TypeError(f"query_start is on {device}, plans are for CUDA devices")
    with current_device(device):
        memory = torch.empty(_core.attend_plan_bytes(), dtype=torch.uint8, device=device)
        return _core.plan_attend(
            *(arrays, query_start, memory, query_tokens, q_heads, format, window, sinks),
            *(sliding_window, strict, _stream(device), max_query_len),
        )


def attend_into(
    out: Tensor,
    lse: Tensor | None,
    arrays: _core.CacheArrays,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    query_start: Tensor,
    *options: Any,
    max_query_len: int = 0,
    plan: _core.AttendPlan | None = None,
) -> None:
    """``attend_over`` into the caller's output (any strides) and log-sum-exp or None."""
    rows = (_readable(q), _readable(k_new), _readable(v_new))
    device = q.device
    with current_device(device):
        size = arrays.attend_workspace_bytes(q.shape[0], q.shape[1], max_query_len)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        launch = (*options, _stream(device), max_query_len, plan)
        _core.attend(arrays, *rows, query_start, out, lse, workspace, *launch)


def cuda_read_bytes(array: Tensor, total: Tensor) -> None:
    """Adds the 64-bit words of a CUDA array to total int64 ``[1]``: a benchmark's lower bound."""
    with current_device(array.device):
        _core.cuda_read_bytes(array, total, _stream(array.device))


def _readable(rows: Tensor) -> Tensor:
    """Rows as the bindings take them, on CUDA devices such as kernels read 16 bytes at a time."""
    if rows.requires_grad:
        rows = rows.detach()  # DLPack refuses it else; these ops have no backward
    if not rows.is_cuda:
        return rows
    per_access = 16 // rows.element_size()
    strides = rows.stride()
    whole = not any(stride % per_access for stride in strides[:-1])
    if whole and strides[-1] == 1 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


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
