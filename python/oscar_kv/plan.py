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


_DECODE_QUERIES = _core.max_decode_queries()


class SharedPlans:
    """The plans of the present step, one for each kind of layer (and device, of a split model).

    The first layer that ever asks leads: it makes a new plan at every call, so that a CUDA graph
    that captures a step captures its planning, too. The others take the leader's of the same step;
    where there is none they go without, which is slower and nothing else.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, _Made] = {}

    def plan(
        self,
        kind: Hashable,
        step: Hashable,
        layer: object,
        make: Callable[[], _core.AttendPlan],
    ) -> _core.AttendPlan | None:
        """The plan of `step` for layers of `kind`, by `make` if `layer` leads; None: there is none.

        step: equal for two calls only if lengths, slots and counts of new tokens are. The plan of
        an earlier step is let go.
        """
        made = self._made.get(kind)
        leader = None if made is None else made.leader()
        if made is None or leader is None or leader is layer:
            self._made[kind] = _Made(weakref.ref(layer), step, make())
            return self._made[kind].plan
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

        shape: of the pages, as far as `q` and `layout` (format, window, sinks) do not say it.
        """
        if q.device.type != "cuda" or max_query_len > _DECODE_QUERIES:
            return None
        return self.shared.plan(
            (q.device, shape, q.shape[1:], layout, sliding_window, strict),
            (self.step, q.shape[0], query_start.shape[0], max_query_len),
            self.layer,
            lambda: ops.plan_attend(
                *(arrays, query_start, q.shape[0], q.shape[1], *layout),
                sliding_window=sliding_window,
                strict=strict,
                max_query_len=max_query_len,
            ),
        )
