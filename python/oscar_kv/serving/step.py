# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""One step of one attention layer in a serving engine.

Pack the tiles that the step completes, restore the sinks of requests that start after a prefix hit,
attend, write the newest rows into the exact memory. In this order, since a hit may end in pages
that another request of the same step packs, and a ring slot may still hold a row that an earlier
query of the chunk reads. With one token a request it does not, and the cache is written at once:
what that token replaces in the ring is older than all that it reads exactly. Every query reads by
position alone (`strict`), so neither the chunks of a prompt nor the batch change what it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .. import _core, ops
from ..device import FaultWord
from ..plan import StepPlans


@dataclass(frozen=True)
class LayerSettings:
    """What is the same in every step: the format, and the attention of the layer."""

    format: str
    window: int
    sinks: int
    scale: float
    softcap: float = 0.0


def run_step(
    settings: LayerSettings,
    writable: _core.CacheArrays,
    arrays: _core.CacheArrays,
    rows: tuple[Tensor, Tensor, Tensor],
    query_start: Tensor,
    out: Tensor,
    *,
    max_query_len: int,
    restore: Callable[[], None] | None = None,
    fault: FaultWord | None = None,
    plans: StepPlans | None = None,
) -> None:
    """Attention of rows (q, k, v) into out ``[tokens, heads, head_dim]``, and the cache after it.

    writable: `arrays` with the pages that may be packed into; k, v in the dtype of the exact
    memory: a token then reads alike in its own chunk and in the next. restore: writes the sinks of
    requests that start after a hit, from pages that are all packed by then. plans: what the layers
    of this step share on a CUDA device.
    """
    q, k, v = rows
    layout = (settings.format, settings.window, settings.sinks)
    at_once = max_query_len == 1
    part = "both" if at_once else "pack"
    ops.append_to(writable, k, v, query_start, *layout, part, fault=fault)
    if restore is not None:
        restore()
    options = (settings.scale, settings.softcap, 0, None, True)
    plan = None
    if plans is not None:
        given = (arrays, k.shape[1:], q, query_start, layout)
        plan = plans.of(*given, 0, True, max_query_len)
    call = (arrays, q, k, v, query_start, *layout, *options)
    ops.attend_into(out, None, *call, max_query_len=max_query_len, plan=plan)
    if not at_once:
        ops.append_to(arrays, k, v, query_start, *layout, "remember", fault=fault)
