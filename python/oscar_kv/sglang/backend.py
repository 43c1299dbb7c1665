# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""The attention backend: one object for all layers, as SGLang has it."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from .. import _core
from ..auto_balance import balance_file
from ..calibration import Calibration
from ..device import FaultWord
from ..measured import Rank, layer_calibration
from ..plan import SharedPlans, StepPlans
from ..serving.layout import SINKS, WINDOW
from ..serving.sinks import restore_sinks
from ..serving.step import LayerSettings, run_step
from .pool import OscarPool
from .refuse import check_layer
from .slots import Slots, Step

BALANCE = "OSCAR_KV_BALANCE"  # environment variable: a file of `oscar calibrate`, or auto

_logger = logging.getLogger("sglang.oscar_kv")


class OscarAttnBackend(AttentionBackend):  # type: ignore[misc]
    """Packed attention over an `OscarPool`."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any, format: str) -> None:
        super().__init__()
        pool = runner.token_to_kv_pool
        if not isinstance(pool, OscarPool):
            raise RuntimeError(
                f"oscar-kv: the KV pool is a {type(pool).__name__}, must be packed: was the plugin "
                "loaded by the process that made it?"
            )
        for name, module in runner.model.named_modules():
            if isinstance(module, RadixAttention):
                check_layer(module, name)
        requests = runner.req_to_token_pool
        self.pool, self.format = pool, format
        self.slots = Slots(requests.req_to_token, requests.req_generation, pool.page_size)
        pool.allocate_exact(requests.req_to_token.shape[0])
        self.device = pool.pages[0].device
        self._config = runner.model_config.hf_config
        given = os.environ.get(BALANCE)
        self._balance = balance_file(given, runner.model_config.model_path) if given else None
        self._measured: dict[int, Calibration] = {}
        self._arrays: dict[tuple[int, int], _core.CacheArrays] = {}
        self._step: Step | None = None
        self._steps = 0  # so far
        self._plans = SharedPlans()
        self._fault = FaultWord(self.device) if self.device.type == "cuda" else None

    def support_triton(self) -> bool:
        """Not on a CPU."""
        return self.device.type != "cpu"

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Padded batches may have more rows than requests may run."""
        self.slots.reserve(max(max_bs, self.slots.rows))
        self._arrays.clear()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """A padded row stands at its first token, in a slot that is nobody's."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """The step's arrays, and the sinks of requests that start after a prefix hit."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        self._steps += 1
        rows = (forward_batch.req_pool_indices, forward_batch.seq_lens)
        if mode.is_decode():
            self._step = self.slots.advance_decode(*rows)
        elif mode.is_extend_or_draft_extend_or_mixed():
            counts, context = (
                (mirror if mirror is not None else tensor.tolist())
                for mirror, tensor in (
                    (forward_batch.extend_seq_lens_cpu, forward_batch.extend_seq_lens),
                    (forward_batch.extend_prefix_lens_cpu, forward_batch.extend_prefix_lens),
                )
            )
            mirror = forward_batch.req_pool_indices_cpu
            self._step = self.slots.advance_extend(*rows, list(counts), list(context), mirror)
        else:
            raise NotImplementedError(f"oscar-kv: forward mode {mode} is not supported")
        self._restore_sinks(self._step)
        self._report_fault()

    def _report_fault(self) -> None:
        """An engine serves on: on a CUDA device such a value was replaced (docs/format.md)."""
        if self._fault is None:
            return
        try:
            self._fault.check()
        except ValueError as error:
            self._fault.clear()
            _logger.error("oscar-kv: %s", error)

    def _restore_sinks(self, step: Step) -> None:
        if not step.hits:
            return
        hits = torch.tensor(step.hits).to(self.device, non_blocking=True)
        first, slot = step.table[hits, 0].long(), step.slot[hits].long()[:, None]
        for index in range(self.pool.layer_num):
            layer = self.pool.start_layer + index
            pages, exact = self.pool.layer(layer)
            restore_sinks(pages, exact, first, slot, self.format, self._of_layer(layer))

    def _of_layer(self, layer: int) -> Calibration:
        """The calibration of a layer, read at its first use."""
        if layer not in self._measured:
            parallel, shape = get_parallel(), self.pool.shape
            rank = Rank(shape.kv_heads, parallel.attn_tp_rank, parallel.attn_tp_size)
            self._measured[layer] = (
                layer_calibration(self._balance, self._config, layer, rank, str(self.device))
                if self._balance
                else Calibration()
            )
        return self._measured[layer]

    def forward_decode(self, *arguments: Any, **keywords: Any) -> Tensor:
        """One token a request: as `forward_extend`."""
        return self.forward_extend(*arguments, **keywords)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **extra: Any,
    ) -> Tensor:
        """q ``[tokens, heads * head_dim]``, k and v by head -> the output, in q's shape."""
        given = sorted(name for name, value in extra.items() if value is not None)
        if given:
            raise NotImplementedError(f"oscar-kv: attention arguments {given} are not supported")
        if k is None or v is None or not save_kv_cache:
            raise NotImplementedError(
                f"oscar-kv: layer {layer.layer_id} shares another layer's cache, it must own one"
            )
        step = self._step
        assert step is not None
        heads, kv_heads, dim = layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim
        settings = LayerSettings(
            self.format, WINDOW, SINKS, float(layer.scaling), float(layer.logit_cap)
        )
        q = q.view(-1, heads, dim)
        dtype = self.pool.shape.exact_dtype
        k, v = (x.view(-1, kv_heads, dim).to(dtype) for x in (k, v))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        arrays = self._handed_over(layer.layer_id, step)
        run_step(
            settings,
            arrays,
            arrays,
            (q, k, v),
            step.query_start,
            out,
            max_query_len=step.max_query_len,
            fault=self._fault,
            plans=StepPlans(self._plans, self._steps, layer),
        )
        return out.view(-1, heads * dim)

    def _handed_over(self, layer: int, step: Step) -> _core.CacheArrays:
        """The layer's arrays, converted once for each batch size: they keep their address."""
        key = (layer, step.slot.shape[0])
        if key not in self._arrays:
            pages, exact = self.pool.layer(layer)
            self._arrays[key] = _core.CacheArrays(
                pages,
                exact,
                step.table,
                step.slot,
                step.context,
                step.exact_from,
                *self._of_layer(layer).arrays(),
            )
        return self._arrays[key]
