# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar demo`: a 16-bit and a packed cache side by side, on a real model and a long text."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .common import (
    ModelOption,
    PackedFormat,
    SinksOption,
    ThreadsOption,
    WindowOption,
    prefill_bar,
    progress_bar,
    set_threads,
)
from .measure import Agreement, Float32Logits, cache_bytes, resident_bytes
from .models import LoadedModel, load_model

if TYPE_CHECKING:
    from transformers import Cache


def demo(
    model: ModelOption = None,
    format: Annotated[PackedFormat, typer.Option(help="Bits of K and V in the packed cache.")] = (
        PackedFormat.K2V2
    ),
    window: WindowOption = 32,
    sinks: SinksOption = 4,
    context_tokens: Annotated[
        int, typer.Option(min=64, help="Length of the text that both caches hold at first.")
    ] = 7000,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens that follow, over which the two are compared.")
    ] = 512,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that each cache then generates by itself, greedily.")
    ] = 64,
    threads: ThreadsOption = None,
) -> None:
    """Compare a 16-bit cache and the packed one.

    Shows text, quality, memory and speed of both. The text is Python's own documentation
    (pydoc_data.topics). Both caches read the same context with exact attention; then the next
    tokens of the text are fed one by one through each cache in turn, and every prediction of the
    one is compared with the other's. At the end each cache generates on its own. The last line of
    the output is one JSON object with all figures.
    """
    set_threads(threads)
    loaded = load_model(model)
    loaded.check_length(context_tokens + tokens + new_tokens)
    if loaded.model.dtype == torch.float32:
        loaded.model.to(torch.bfloat16)
    ids = _text_ids(loaded, context_tokens + tokens + 1)
    with torch.inference_mode():
        _warm_up(loaded, ids)
        head = Float32Logits(loaded.model)
        exact, packed = _make_sides(loaded, head, format.value, window, sinks)
        for side in (exact, packed):
            side.prefill(ids[:, :context_tokens])
        agreement = _teacher_force((exact, packed), ids[:, context_tokens:])
        held = [cache_bytes(side.cache) for side in (exact, packed)]
        for side in (exact, packed):
            side.generate(loaded, new_tokens)
    report = _Report(exact, packed, agreement, held, context_tokens, tokens)
    report.show()
    print(json.dumps(report.figures()))


def _text_ids(loaded: LoadedModel, count: int) -> Tensor:
    """The first `count` tokens [1, count] of a text that every Python brings along."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = loaded.encode(text[: 12 * count])
    if ids.shape[1] < count:
        ids = loaded.encode(text)
    if ids.shape[1] < count:
        raise ValueError(f"{count} tokens are needed, pydoc_data.topics has {ids.shape[1]}")
    return ids[:, :count]


def _warm_up(loaded: LoadedModel, ids: Tensor) -> None:
    """Lets torch allocate what it keeps, so that it is not counted as a cache's memory."""
    cache = loaded.model(ids[:, :64], use_cache=True, logits_to_keep=1).past_key_values
    loaded.model(ids[:, 64:65], past_key_values=cache)


@dataclass
class _Side:
    """One of the two caches, with what was measured on it."""

    title: str
    model: Any
    head: Float32Logits
    cache: Cache
    packed: bool
    prefill_seconds: float = 0.0
    growth: int | None = None  # of the process's resident memory, by reading the context
    seconds: list[float] = field(default_factory=list)  # of each step
    logits: Tensor | None = None  # after the newest token, [vocabulary]
    text: str = ""

    def _attention(self) -> AbstractContextManager[None]:
        """The packed cache is read by ours, the 16-bit one by the model's own attention."""
        from ..hf.install import attention_installed

        return attention_installed(self.model) if self.packed else nullcontext()

    def prefill(self, ids: Tensor) -> None:
        before = resident_bytes()
        start = time.perf_counter()
        title = f"{self.title}: reading {ids.shape[1]} tokens"
        with self._attention(), prefill_bar(title, self.model):
            output = self.model(ids, past_key_values=self.cache, logits_to_keep=1)
        self.logits = self.head.of(output.logits)
        self.prefill_seconds = time.perf_counter() - start
        del output
        after = resident_bytes()
        self.growth = None if before is None or after is None else after - before

    def step(self, token: int) -> float:
        """Feeds one token; seconds that the model took."""
        ids = torch.tensor([[token]])
        with self._attention():
            start = time.perf_counter()
            output = self.model(ids, past_key_values=self.cache)
            seconds = time.perf_counter() - start
        self.logits = self.head.of(output.logits)
        return seconds

    def generate(self, loaded: LoadedModel, count: int) -> None:
        """Goes on greedily from the newest token."""
        ends = loaded.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        tokens: list[int] = []
        with progress_bar(f"{self.title}: generating {count} tokens", count) as advance:
            while len(tokens) < count and not ends & set(tokens):
                assert self.logits is not None
                tokens.append(int(self.logits.argmax()))
                self.step(tokens[-1])
                advance()
        self.text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)

    @property
    def tokens_per_second(self) -> float:
        return 1 / statistics.median(self.seconds)


def _make_sides(
    loaded: LoadedModel, head: Float32Logits, format: str, window: int, sinks: int
) -> tuple[_Side, _Side]:
    from transformers import DynamicCache

    from ..hf import OscarCache

    config = loaded.model.config
    dense = DynamicCache(config=config)
    packed = OscarCache(config, format=format, window=window, sinks=sinks)
    return (
        _Side("16 bit", loaded.model, head, dense, packed=False),
        _Side(f"packed {format}", loaded.model, head, packed, packed=True),
    )


def _teacher_force(sides: tuple[_Side, _Side], ids: Tensor) -> Agreement:
    """Feeds ids [1, n] but the last through both caches; compares the n - 1 predictions."""
    tokens = ids[0].tolist()
    agreement = Agreement()
    with progress_bar(f"comparing {len(tokens) - 1} predictions", len(tokens) - 1) as advance:
        for index, (token, following) in enumerate(itertools.pairwise(tokens)):
            # In turns, so that neither always runs on what the other left in the CPU's caches.
            for side in sides if index % 2 else sides[::-1]:
                side.seconds.append(side.step(token))
            exact, packed = sides
            assert exact.logits is not None and packed.logits is not None
            agreement.add(exact.logits, packed.logits, following)
            advance()
    return agreement


@dataclass
class _Report:
    exact: _Side
    packed: _Side
    agreement: Agreement
    held: list[dict[str, int]]  # bytes by part, 16 bit and packed
    context: int
    tokens: int

    def figures(self) -> dict[str, float | int]:
        """The JSON object of the last line."""
        exact_bytes, packed_bytes = (sum(parts.values()) for parts in self.held)
        nll_exact, nll_packed = self.agreement.nll
        return {
            "kl": round(self.agreement.kl, 5),
            "top1": round(self.agreement.top1, 5),
            "nll_16bit": round(nll_exact, 5),
            "nll_packed": round(nll_packed, 5),
            "bytes_16bit": exact_bytes,
            "bytes_packed": packed_bytes,
            "ratio": round(exact_bytes / packed_bytes, 4),
            "tokens_per_s_16bit": round(self.exact.tokens_per_second, 3),
            "tokens_per_s_packed": round(self.packed.tokens_per_second, 3),
            "context_tokens": self.context,
        }

    def show(self) -> None:
        """Prints the two texts and the table of figures."""
        console = Console(highlight=False)
        texts = Table(title="What each cache goes on with (greedy)", title_justify="left")
        for side in (self.exact, self.packed):
            texts.add_column(side.title, ratio=1)
        texts.add_row(Text(self.exact.text), Text(self.packed.text))
        console.print()
        console.print(texts)
        console.print()
        console.print(self._table())
        parts = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in self.held[1].items())
        console.print(f"packed cache by part, MB: {parts}\n")

    def _table(self) -> Table:
        figures = self.figures()
        table = Table(
            title=f"{self.context} tokens of context, then {self.tokens} compared",
            title_justify="left",
        )
        table.add_column("")
        for side in (self.exact, self.packed):
            table.add_column(side.title, justify="right")
        table.add_column("")
        sizes = [f"{sum(parts.values()) / 1e6:.1f}" for parts in self.held]
        table.add_row("bytes held by the cache, MB", *sizes, f"{figures['ratio']:.2f} x smaller")
        growth = [side.growth for side in (self.exact, self.packed)]
        if None not in growth:
            cells = [f"{(size or 0) / 1e6:.1f}" for size in growth]
            table.add_row("growth of the process, MB", *cells, "by the context")
        table.add_row("mean KL(16 bit || packed), nats", "", f"{figures['kl']:.4f}", "")
        table.add_row("same most likely token", "", f"{figures['top1']:.1%}", "")
        nll = self.agreement.nll
        cells = [f"{x:.4f}" for x in nll]
        table.add_row("NLL of the text, nats", *cells, f"{nll[1] - nll[0]:+.4f}")
        speeds = [side.tokens_per_second for side in (self.exact, self.packed)]
        faster = f"{speeds[1] / speeds[0]:.2f} x as fast"
        table.add_row("tokens a second (median step)", *[f"{x:.1f}" for x in speeds], faster)
        seconds = [f"{side.prefill_seconds:.1f}" for side in (self.exact, self.packed)]
        table.add_row("reading the context, s", *seconds, "")
        return table
