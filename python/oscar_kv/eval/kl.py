# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Distance of next-token predictions from those of the exact cache, per format.

Each document is prefilled exactly up to `prompt`, then decoded by teacher forcing through every
format. All arithmetic is float32, without TF32: in bfloat16 one prediction in twenty has two most
likely tokens with the very same logit. Everything happens on the device of the model.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from .formats import AnyFormat
from .simulate import Decoded, PackedFormat, Prefill, decode, decode_packed, prefill

_ROWS = 256  # positions whose logits exist at a time


@dataclass
class Document:
    """ids int64 [1, tokens], on any device; kind: docs, code, prose, chat or file."""

    name: str
    kind: str
    ids: Tensor


@dataclass
class DocumentResult:
    """One format on one document; on the CPU, [queries], positions prompt..tokens-1.

    kl: KL(exact || format) in nats. dnll: change of the negative log-likelihood of the token that
    came, one element fewer. same: whether the most likely token is the same.
    """

    document: str
    kl: Tensor
    dnll: Tensor
    same: Tensor
    bits: float
    packed_bits: float
    seconds: float


@dataclass
class FormatResult:
    """One format on all documents; means over documents."""

    format: str
    label: str
    real: bool  # through the packed kernels
    documents: list[DocumentResult] = field(default_factory=list)

    def _means(self, name: str) -> list[float]:
        return [float(getattr(result, name).float().mean()) for result in self.documents]

    @property
    def kl(self) -> float:
        """Mean KL, nats."""
        return _mean(self._means("kl"))

    @property
    def kl_stderr(self) -> float | None:
        """Standard error of the mean over documents, None for a single one."""
        values = self._means("kl")
        if len(values) < 2:
            return None
        return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(len(values))

    @property
    def bits(self) -> float:
        """Bits an element at the end of a document, everything counted."""
        return _mean([result.bits for result in self.documents])

    @property
    def packed_bits(self) -> float:
        """Bits an element of the packed part."""
        return _mean([result.packed_bits for result in self.documents])

    @property
    def worst(self) -> float:
        """Mean KL of the document where it is largest."""
        return max(self._means("kl"))

    def kl_quantiles(self) -> tuple[float, float, float]:
        """Median, 99 % and 99.9 % quantile of the KL over all decoded positions, nats."""
        pooled = torch.cat([result.kl for result in self.documents]).double()
        median, p99, p999 = (float(pooled.quantile(share)) for share in (0.5, 0.99, 0.999))
        return median, p99, p999

    def row(self) -> dict[str, Any]:
        """The row of the JSON file, without the run's settings (settings.py)."""
        median, p99, p999 = self.kl_quantiles()
        return {
            "format": self.format,
            "label": self.label,
            "bits": self.bits,
            "packed_bits": self.packed_bits,
            "kl": self.kl,
            "kl_stderr": self.kl_stderr,
            "kl_median": median,
            "kl_p99": p99,
            "kl_p999": p999,
            "kl_worst_document": self.worst,
            "dnll": _mean(self._means("dnll")),
            "top1": _mean(self._means("same")),
            "packed_kernels": self.real,
            "seconds": _mean([result.seconds for result in self.documents]),
            "documents": {result.document: float(result.kl.mean()) for result in self.documents},
        }

    def curve(self, points: int = 32) -> Tensor:
        """Mean KL over documents in `points` bins of the position, [points or fewer]."""
        shortest = min(result.kl.numel() for result in self.documents)
        stacked = torch.stack([result.kl[:shortest] for result in self.documents]).mean(0)
        return torch.stack([part.mean() for part in stacked.tensor_split(min(points, shortest))])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class OutputHead:
    """Logits from final hidden states, checked against what the model itself returns.

    Raises NotImplementedError for a model that does more than a head and a soft cap.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._head = model.get_output_embeddings()
        config = model.config.get_text_config(decoder=True)
        self._cap = getattr(config, "final_logit_softcapping", None)
        ids = torch.arange(8, device=model.device)[None] % config.vocab_size
        with torch.inference_mode():
            expected = model(input_ids=ids, use_cache=False).logits[0]
            found = self(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            raise NotImplementedError(
                f"{type(model).__name__} scales its logits in a way that is not known here"
            )

    def __call__(self, hidden: Tensor) -> Tensor:
        """float32 [tokens, vocabulary] of hidden [tokens, hidden_size]."""
        logits = self._head(hidden).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Float32 products of a GPU in full precision, afterwards as they were."""
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [part.fp32_precision for part in parts]
    for part in parts:
        part.fp32_precision = "ieee"
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


@torch.inference_mode()
@no_tf32()
def evaluate(
    model: PreTrainedModel,
    documents: Sequence[Document],
    formats: Sequence[AnyFormat],
    prompt: int,
    advance: Callable[[str], None] = lambda _: None,
) -> list[FormatResult]:
    """Measures every format on every document; `prompt` tokens of each are prefilled exactly.

    advance is called with a line of text before each of the ``len(documents) * (len(formats) + 2)``
    steps. Raises TypeError for a model that is not float32.
    """
    if model.dtype != torch.float32:
        raise TypeError(f"the model has dtype {model.dtype}, must be float32: see load_model")
    head = OutputHead(model)
    results = [FormatResult(one.name, one.label, isinstance(one, PackedFormat)) for one in formats]
    for number, document in enumerate(documents):
        advance(f"{document.name}: exact")
        start = prefill(model, document.ids, prompt, seed=number)
        exact = decode(model, start)
        runs: list[tuple[Decoded, float]] = []
        for one in formats:
            advance(f"{document.name}: {one.name}")
            runs.append(_timed(model, start, one))
        del start
        advance(f"{document.name}: comparing")
        following = document.ids[0, prompt + 1 :].to(model.device)
        compared = compare(head, exact.hidden, [run.hidden for run, _ in runs], following)
        for result, figures, (run, seconds) in zip(results, compared, runs, strict=True):
            result.documents.append(
                DocumentResult(document.name, *figures, run.bits, run.packed_bits, seconds)
            )
    return results


def _timed(model: PreTrainedModel, start: Prefill, one: AnyFormat) -> tuple[Decoded, float]:
    began = _now(model.device)
    if isinstance(one, PackedFormat):
        found = decode_packed(model, start, one)
    else:
        found = decode(model, start, one)
    return found, _now(model.device) - began


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def compare(
    head: Callable[[Tensor], Tensor], exact: Tensor, others: Sequence[Tensor], following: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(kl, dnll, same) of each of `others` against `exact`, all hidden [queries, hidden_size].

    following: the tokens after queries 0..queries-2. The results are on the CPU.
    """
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in others]
    for first in range(0, exact.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        target = following[rows]
        known = slice(0, target.shape[0])
        log_p = head(exact[rows]).log_softmax(-1)
        p, top = log_p.exp(), log_p.argmax(-1)
        nll = functional.nll_loss(log_p[known], target, reduction="none")
        for found, hidden in zip(parts, others, strict=True):
            log_q = head(hidden[rows]).log_softmax(-1)
            dnll = functional.nll_loss(log_q[known], target, reduction="none") - nll
            same = log_q.argmax(-1) == top
            found.append(((p * (log_p - log_q)).sum(-1).cpu(), dnll.cpu(), same.cpu()))
    return [tuple(map(torch.cat, zip(*found, strict=True))) for found in parts]  # type: ignore[misc]


def pareto(rows: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (bits, kl) pairs that no other pair beats in both, by bits."""
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    best, kept = math.inf, []
    for i in order:
        if rows[i][1] < best:
            best = rows[i][1]
            kept.append(i)
    return kept
