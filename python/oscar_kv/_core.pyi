# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
from torch import Tensor

format_version: int

class AttendPlan: ...

class CacheArrays:
    def __init__(
        self,
        pages: Tensor,
        exact: Tensor,
        block_table: Tensor,
        slot: Tensor,
        seq_len: Tensor,
        exact_from: Tensor | None,
        balance: Tensor | None,
        feedback: Tensor | None = None,
        center: Tensor | None = None,
    ) -> None: ...
    def attend_workspace_bytes(
        self, query_tokens: int, q_heads: int, max_query_len: int = 0
    ) -> int: ...

def append(
    cache: CacheArrays,
    k: Tensor,
    v: Tensor,
    query_start: Tensor,
    format: str,
    window: int,
    sinks: int,
    part: str,
    stream: int = 0,
    fault: int = 0,
) -> None: ...
def attend(
    cache: CacheArrays,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    query_start: Tensor,
    out: Tensor,
    lse: Tensor | None,
    workspace: Tensor,
    format: str,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
    sliding_window: int,
    sink_logits: Tensor | None,
    strict: bool,
    stream: int = 0,
    max_query_len: int = 0,
    plan: AttendPlan | None = None,
) -> None: ...
def attend_plan_bytes() -> int: ...
def max_decode_queries() -> int: ...
def plan_attend(
    cache: CacheArrays,
    query_start: Tensor,
    memory: Tensor,
    query_tokens: int,
    q_heads: int,
    format: str,
    window: int,
    sinks: int,
    sliding_window: int,
    strict: bool,
    stream: int = 0,
    max_query_len: int = 0,
) -> AttendPlan: ...
def dequantize(
    cache: CacheArrays, k_out: Tensor, v_out: Tensor, format: str, window: int, sinks: int
) -> None: ...
def tile_bytes(head_dim: int, format: str) -> int: ...
def ring_tokens(window: int) -> int: ...
def formats() -> list[str]: ...
def available_backends() -> list[str]: ...
def active_backend() -> str: ...
def set_backend(name: str) -> None: ...
def cuda_built() -> bool: ...
def cuda_available() -> bool: ...
def max_threads() -> int: ...
def read_bytes(array: Tensor) -> int: ...
def cuda_read_bytes(array: Tensor, total: Tensor, stream: int) -> None: ...
def version() -> str: ...
