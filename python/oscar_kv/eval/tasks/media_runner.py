# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Answers to a question about images or sounds, from several cache formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...balance import Balance
from .media import make_inputs
from .runner import EXACT, Answer, cache_bits, checked_formats, greedy

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from transformers import Cache, PreTrainedModel


class MediaRunner:
    """Greedy answers of one model from several cache formats.

    model: with the "oscar" attention function (`oscar_kv.hf.install.attention_installed`); of an
    omni model the thinker answers. formats: names of `known_formats`. balance: of the packed
    formats; "auto" measures each prompt's own, so that answers do not depend on their order.

    Each format reads the prompt by itself, exactly, as `generate` does: models keep what they know
    of image positions beside the cache, so that a cache cannot be handed on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        formats: Sequence[str],
        *,
        window: int = 32,
        sinks: int = 4,
        balance: Balance | str | None = "auto",
    ) -> None:
        from ...hf.install import decoder_of

        self.formats = checked_formats(formats)
        self.model, self.processor = decoder_of(model), processor
        self.settings: dict[str, Any] = {"window": window, "sinks": sinks, "balance": balance}

    def run(
        self,
        text: str,
        new_tokens: int,
        *,
        images: Sequence[Image] = (),
        sounds: Sequence[np.ndarray] = (),
        formats: Sequence[str] | None = None,
    ) -> dict[str, tuple[str, Answer]]:
        """(text of the answer, Answer) of each of `formats` (None: all of them)."""
        inputs = make_inputs(self.model, self.processor, text, images, sounds)
        prompt = inputs["input_ids"].shape[1]
        answers = {}
        for name in self.formats if formats is None else formats:
            cache = self._cache(name)
            out = self.model.generate(
                **inputs, past_key_values=cache, **greedy(self.model, new_tokens)
            )
            tokens = out[0, prompt:].tolist()
            said = self.processor.decode(tokens, skip_special_tokens=True)
            answers[name] = (said, Answer(tokens, cache_bits(cache)))
        return answers

    def _cache(self, name: str) -> Cache:
        from transformers import DynamicCache

        from ...hf import OscarCache

        if name == EXACT:
            return DynamicCache(config=self.model.config)
        return OscarCache(self.model.config, format=name, **self.settings)
