# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Measures caches: bytes they hold, memory of the process, distance of two predictions."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Bytes of the storages a cache holds, by part; parts without bytes are left out."""
    from ..hf import OscarCache

    if isinstance(cache, OscarCache):
        memory = cache.memory()
        names = ("packed", "exact", "tables", "pending", "other")
        parts = {name: int(getattr(memory, name)) for name in names}
        return {name: size for name, size in parts.items() if size}
    storages = {}
    for tensor in _tensors(cache):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return {"dense": sum(storages.values())}


def dense_bytes(cache: Cache) -> int:
    """What the tokens of a cache take as 16-bit K and V."""
    from ..hf import OscarCache

    if isinstance(cache, OscarCache):
        memory = cache.memory()
        return 2 * memory.elements + memory.other
    return sum(2 * tensor.numel() for tensor in _tensors(cache))


def _tensors(cache: Cache) -> Iterator[Tensor]:
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                yield value


def resident_bytes() -> int | None:
    """Memory of this process as the operating system counts it, None where it does not say.

    Memory that the allocator merely keeps for later is given back first.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Float32Logits:
    """The newest token's logits, with the output head computed in float32.

    In bfloat16 one prediction in twenty has two most likely tokens with the very same logit: which
    of them comes first would count as disagreement of the caches. A model that caps or scales its
    logits afterwards keeps its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        self._weight = head.weight.float()
        self._bias = None if head.bias is None else head.bias.float()
        self._hidden: Tensor | None = None
        head.register_forward_pre_hook(self._remember)

    def _remember(self, _: Any, arguments: tuple[Tensor, ...]) -> None:
        self._hidden = arguments[0]

    @torch.no_grad()
    def of(self, own: Tensor) -> Tensor:
        """Logits [vocabulary] of the last forward pass; own: what it returned [1, tokens, v]."""
        last = own[0, -1].float()
        if self._hidden is None:
            return last
        logits = functional.linear(self._hidden[0, -1].float(), self._weight, self._bias)
        error = (logits - last).norm() / last.norm()
        return logits if float(error) < 0.02 else last


class Agreement:
    """Compares the next-token distributions of two caches, token by token."""

    def __init__(self) -> None:
        self._kl: list[float] = []
        self._same: list[bool] = []
        self._nll: tuple[list[float], list[float]] = ([], [])

    def add(self, exact: Tensor, packed: Tensor, token: int) -> None:
        """exact, packed: logits [vocabulary] of the prediction; `token` is what came."""
        log_p, log_q = (x.double().log_softmax(-1) for x in (exact, packed))
        self._kl.append(float((log_p.exp() * (log_p - log_q)).sum()))
        self._same.append(bool(log_p.argmax() == log_q.argmax()))
        for values, log in zip(self._nll, (log_p, log_q), strict=True):
            values.append(-float(log[token]))

    @property
    def kl(self) -> float:
        """Mean KL(exact || packed), nats."""
        return _mean(self._kl)

    @property
    def top1(self) -> float:
        """Share of tokens whose most likely successor is the same."""
        return _mean(self._same)

    @property
    def nll(self) -> tuple[float, float]:
        """Mean negative log-likelihood of the true token: exact, packed."""
        return _mean(self._nll[0]), _mean(self._nll[1])


def _mean(values: list[float] | list[bool]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
