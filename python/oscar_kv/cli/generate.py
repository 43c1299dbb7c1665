# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""`oscar generate`: streams a model's text out of a packed or a 16-bit cache."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch import Tensor

from .common import (
    CacheFormat,
    InputError,
    ModelOption,
    SinksOption,
    ThreadsOption,
    WindowOption,
    prefill_bar,
    read_text,
    set_threads,
)
from .measure import cache_bytes, dense_bytes
from .models import LoadedModel, load_model

if TYPE_CHECKING:
    from transformers import Cache


def generate(
    prompt_file: Annotated[
        Path, typer.Option("--prompt-file", metavar="FILE", help="UTF-8 text to go on from.")
    ],
    model: ModelOption = None,
    format: Annotated[CacheFormat, typer.Option(help="Bits of K and V in the cache.")] = (
        CacheFormat.K2V2
    ),
    window: WindowOption = 32,
    sinks: SinksOption = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: greedy; above: sample at this temperature.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    balance: Annotated[
        str,
        typer.Option(
            metavar="FILE|auto|none",
            help="What `oscar calibrate` wrote; auto: measure at the prompt; none: do without.",
        ),
    ] = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Stream a model's text out of a packed cache.

    The text goes to stdout, progress and statistics to stderr. The prompt is read with exact
    attention; each new token then reads the cache. With --format 16bit it is transformers' own
    cache in the model's dtype, for comparison.

    Example: oscar generate --model ./checkpoint --prompt-file long.txt --format k2v2
    """
    set_threads(threads)
    prompt = read_text(prompt_file, "--prompt-file")
    factors = _read_balance(balance)
    loaded = load_model(model)
    ids = _encode(loaded, prompt, chat)
    loaded.check_length(ids.shape[1] + max_new_tokens)
    torch.manual_seed(seed)

    cache = _make_cache(loaded, format, window, sinks, factors)
    clock = _run(loaded, ids, cache, max_new_tokens, temperature)
    _print_statistics(cache, ids.shape[1], clock)


def _read_balance(value: str) -> Any:
    from ..balance import Balance

    if value in ("auto", "none"):
        return None if value == "none" else "auto"
    return Balance.load(value)


def _encode(loaded: LoadedModel, prompt: str, chat: bool) -> Tensor:
    if not chat:
        return loaded.encode(prompt)
    if not loaded.tokenizer.chat_template:
        raise InputError(f"--chat: {loaded.name} has no chat template")
    messages = [{"role": "user", "content": prompt}]
    text = loaded.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return loaded.encode(text)


def _make_cache(
    loaded: LoadedModel, format: CacheFormat, window: int, sinks: int, balance: Any
) -> Cache:
    from transformers import DynamicCache

    from ..hf import OscarCache, enable

    config = loaded.model.config
    if format is CacheFormat.EXACT:
        return DynamicCache(config=config)
    options = {"format": format.value, "window": window, "sinks": sinks, "balance": balance}
    enable(loaded.model, **options)
    return OscarCache(config, **options)


class _Clock:
    """Notes when tokens come; the first two calls of a streamer are the prompt and token one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @property
    def prefill_seconds(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def new_tokens(self) -> int:
        return len(self.times) - 1

    @property
    def tokens_per_second(self) -> float | None:
        seconds = self.times[-1] - self.times[1]
        return (self.new_tokens - 1) / seconds if seconds > 0 else None


def _run(
    loaded: LoadedModel, ids: Tensor, cache: Cache, max_new_tokens: int, temperature: float
) -> _Clock:
    from transformers import TextStreamer

    clock = _Clock()
    with ExitStack() as bar:
        bar.enter_context(prefill_bar(f"reading {ids.shape[1]} tokens", loaded.model))

        class Streamer(TextStreamer):  # type: ignore[misc]
            def put(self, value: Tensor) -> None:
                clock.times.append(time.perf_counter())
                if len(clock.times) == 2:
                    bar.close()
                super().put(value)

        options: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            options["temperature"] = temperature
        loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            streamer=Streamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **options,
        )
    return clock


def _print_statistics(cache: Cache, context: int, clock: _Clock) -> None:
    parts = cache_bytes(cache)
    total = sum(parts.values())
    ratio = dense_bytes(cache) / total
    speed = clock.tokens_per_second
    listed = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in parts.items())
    lines = [
        f"context {context} tokens, prefill {clock.prefill_seconds:.2f} s",
        f"new tokens {clock.new_tokens}" + (f", {speed:.2f} tokens/s" if speed else ""),
        f"cache {total / 1e6:.2f} MB ({listed}), {ratio:.2f} times smaller than 16 bit",
    ]
    for line in lines:
        typer.echo(line, err=True)
