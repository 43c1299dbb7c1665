# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""One attention plan for all layers of a decode step on a CUDA device (ops.plan_attend)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import _core, ops


@dataclass
class _Made:
    leader: weakref.ref[object]
    step: Hashable
    plan: _core.AttendPlan


_DECODE_QUERIES = 8  # query tokens of a sequence that still take the decode kernel


class SharedPlans:
    """The plans of the present step, by what they are made for.

    The first layer that ever asks leads: it makes a new plan at every call, so that a CUDA graph
    that captures a step captures its planning, too. The others take the leader's of the same step;
    where there is none they go without, which is slower and nothing else.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, _Made] = {}

    def plan(
        self,
        shape: Hashable,
        step: Hashable,
        layer: object,
        make: Callable[[], _core.AttendPlan],
    ) -> _core.AttendPlan | None:
        """The plan for `shape` in `step`, made by `make` if `layer` leads; None if there is none.

        step: equal for two calls only if lengths, slots and counts of new tokens are.
        """
        made = self._made.get(shape)
        leader = None if made is None else made.leader()
        if made is None or leader is None or leader is layer:
            self._made[shape] = _Made(weakref.ref(layer), step, make())
            return self._made[shape].plan
        return made.plan if made.step == step else None

    def __reduce__(self) -> tuple[Any, ...]:
        return (SharedPlans, ())  # copies plan for themselves


@dataclass(frozen=True)
class StepPlans:
    """What `layer` may use of `shared` in the step `step` (SharedPlans.plan)."""

    shared: SharedPlans
    step: Hashable
    layer: object

    def of(
        self,
        arrays: _core.CacheArrays,
        shape: Hashable,
        q: Tensor,
        query_start: Tensor,
        layout: tuple[str, int, int],
        sliding_window: int,
        strict: bool,
        max_query_len: int,
    ) -> _core.AttendPlan | None:
        """The plan of ``attend`` with these arguments; None where it goes without.

        shape: of the arrays, as far as `q` and `layout` (format, window, sinks) do not say it.
        """
        if q.device.type != "cuda" or max_query_len > _DECODE_QUERIES:
            return None
        options = (sliding_window, strict, max_query_len)
        return self.shared.plan(
            (shape, q.shape, query_start.shape, layout, options),
            self.step,
            self.layer,
            lambda: ops.plan_attend(
                *(arrays, query_start, q.shape[0], q.shape[1], *layout),
                sliding_window=sliding_window,
                strict=strict,
                max_query_len=max_query_len,
            ),
        )
