# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a prompt through several caches: the prompt is read once, exactly, and shared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...balance import Balance, calibrate
from .haystack import local_text

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, PreTrainedModel

EXACT = "16bit"
_CALIBRATION_TOKENS = 2048


@dataclass(frozen=True)
class Answer:
    """What a cache format answered: token ids (no prompt) and bits per element of its cache."""

    tokens: list[int]
    bits: float


def known_formats() -> list[str]:
    """Names that a Runner takes: transformers' own cache and the packed formats."""
    from ... import _core

    return [EXACT, *_core.formats()]


def checked_formats(formats: Sequence[str]) -> list[str]:
    """`formats` without repeats; ValueError for one that is not of `known_formats`."""
    known = known_formats()
    for name in formats:
        if name not in known:
            raise ValueError(f"format is {name!r}, must be one of {', '.join(known)}")
    return list(dict.fromkeys(formats))


def greedy(model: PreTrainedModel, new_tokens: int) -> dict[str, Any]:
    """Arguments of ``generate`` for greedy answers, whatever the checkpoint would sample."""
    pad = model.generation_config.pad_token_id
    return {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "pad_token_id": 0 if pad is None else pad,
    }


def local_balance(model: PreTrainedModel, encode: Callable[[str], Tensor]) -> Balance:
    """The balance of a model, measured on text that comes with Python.

    A fixed text rather than the first prompt: results then do not depend on the order of prompts,
    on where a run was resumed, or on the task. encode: text to ids [1, tokens].
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = min(_CALIBRATION_TOKENS, limit or _CALIBRATION_TOKENS)
    ids = encode(local_text()[: 16 * tokens])[:, :tokens]
    return calibrate(model, ids.to(model.device))


class Runner:
    """Greedy answers of one model from several cache formats.

    formats: names of `known_formats`. balance: of the packed formats, None: factors of 1. The model
    must have the "oscar" attention function (`oscar_kv.hf.install.attention_installed`).

    The prompt is read once into transformers' cache with exact attention, as `generate` does; its
    K and V are then packed into one OscarCache a format, which holds the same bytes as if it had
    read the prompt itself. So every format starts from the same first token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        formats: Sequence[str],
        *,
        window: int = 32,
        sinks: int = 4,
        balance: Balance | None = None,
    ) -> None:
        self.formats = checked_formats(formats)
        self.model = model
        self.settings: dict[str, Any] = {"window": window, "sinks": sinks}
        self.balance = balance

    def run(
        self,
        ids: Sequence[int],
        new_tokens: int,
        *,
        held: int | None = None,
        formats: Sequence[str] | None = None,
        done: Callable[[list[int]], bool] | None = None,
        min_new_tokens: int = 0,
        eos: list[int] | None = None,
    ) -> dict[str, Answer]:
        """Up to `new_tokens` tokens from each of `formats` (None: all of them).

        held: so many tokens of `ids` are read first, alone; the rest then comes as one chunk over
        the (packed) cache. None: the whole prompt is read exactly. done: stops as soon as it is
        true of the new tokens. eos: end-of-sequence ids instead of the model's own.
        Raises ValueError unless 0 < held < len(ids).
        """
        if held is not None and not 0 < held < len(ids):
            raise ValueError(f"held is {held}, must be 1 to {len(ids) - 1} of {len(ids)} tokens")
        prompt = torch.tensor([list(ids)], device=self.model.device)
        options: dict[str, Any] = {}
        if min_new_tokens:
            options["min_length"] = len(ids) + min_new_tokens
        if eos is not None:
            options["eos_token_id"] = eos
        exact = self._exact_cache()
        first = self._generate(prompt[:, :held], exact, 1, None, options)
        start = first if held is None else prompt
        wanted = [name for name in self.formats if formats is None or name in formats]
        answers = {}
        # The 16-bit cache goes on from the prompt's own cache, so it has to come last.
        for name in sorted(wanted, key=lambda name: name == EXACT):
            cache: Cache = exact if name == EXACT else self._packed_cache(name, exact)
            remaining = len(ids) + new_tokens - start.shape[1]
            out = start
            if remaining > 0 and not self._ended(start, len(ids), done, eos):
                stop = None if done is None else _stopping(done, len(ids))
                out = self._generate(start, cache, remaining, stop, options)
            answers[name] = Answer(out[0, len(ids) :].tolist(), cache_bits(cache))
        return {name: answers[name] for name in wanted}

    def _exact_cache(self) -> DynamicCache:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def _packed_cache(self, name: str, exact: DynamicCache) -> Cache:
        """A cache of format `name` that holds the tokens of `exact`."""
        from ...hf import OscarCache
        from ...hf.layer import OscarLayer

        cache = OscarCache(self.model.config, format=name, balance=self.balance, **self.settings)
        for index, source in enumerate(exact.layers):
            layer = cache.layers[index]
            if isinstance(layer, OscarLayer):
                layer.update(source.keys, source.values)
                layer.commit()
            else:
                cache.layers[index] = copy.deepcopy(source)
        return cache

    def _generate(
        self, ids: Tensor, cache: Cache, new_tokens: int, stop: Any, options: dict[str, Any]
    ) -> Tensor:
        """ids and what follows them, [1, tokens]; greedy."""
        out: Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            stopping_criteria=stop,
            **greedy(self.model, new_tokens),
            **options,
        )
        return out

    def _ended(
        self,
        ids: Tensor,
        prompt_tokens: int,
        done: Callable[[list[int]], bool] | None,
        eos: list[int] | None,
    ) -> bool:
        """Whether nothing may follow the new tokens there are."""
        new = ids[0, prompt_tokens:].tolist()
        if not new:
            return False
        own = self.model.generation_config.eos_token_id if eos is None else eos
        ends = own if isinstance(own, list) else [own]
        return new[-1] in ends or (done is not None and done(new))


def _stopping(done: Callable[[list[int]], bool], prompt_tokens: int) -> Any:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Done(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            ended = done(input_ids[0, prompt_tokens:].tolist())
            return torch.tensor([ended], device=input_ids.device)

    return StoppingCriteriaList([Done()])


def cache_bits(cache: Cache) -> float:
    """Bits per K and V element as held, windows included."""
    from ...hf import OscarCache

    if isinstance(cache, OscarCache):
        return cache.memory().bits_per_element
    held = [getattr(layer, "keys", None) for layer in cache.layers]
    return 8.0 * next(keys.element_size() for keys in held if keys is not None)
