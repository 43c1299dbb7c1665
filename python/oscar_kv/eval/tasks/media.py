# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts with images and sounds, for any processor of transformers."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .extras import need

if TYPE_CHECKING:
    from PIL.Image import Image


def prompt_text(processor: Any, text: str, images: int = 0, sounds: int = 0) -> str:
    """One user turn, images and sounds first: in the chat template, where there is one, else
    placeholders and the text."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if template:
        content: list[dict[str, str]] = [{"type": "image"}] * images
        content += [{"type": "audio", "audio_url": f"{number}.wav"} for number in range(sounds)]
        content.append({"type": "text", "text": text})
        made: str = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
        )
        return made
    tokens = [getattr(processor, "image_token", "")] * images
    tokens += [getattr(processor, "audio_token", "")] * sounds
    return "".join(tokens) + "\n" + text


def make_inputs(
    model: Any,
    processor: Any,
    text: str,
    images: Sequence[Image] = (),
    sounds: Sequence[np.ndarray] = (),
) -> dict[str, Tensor]:
    """Arguments of the model's forward pass for one prompt, on its device and in its dtype.

    sounds: float32 [samples] at the rate of `sampling_rate`. Raises ValueError for a processor that
    takes no images, or no sounds, where there are some.
    """
    media: dict[str, Any] = {}
    if images:
        if not hasattr(processor, "image_processor"):
            raise ValueError(f"{type(processor).__name__} takes no images")
        media["images"] = list(images)
    if sounds:
        media["audio"] = list(sounds)
        media["sampling_rate"] = sampling_rate(processor)
    prompt = prompt_text(processor, text, len(images), len(sounds))
    batch = processor(text=[prompt], return_tensors="pt", **media)
    found = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in found.items()
    }


def sampling_rate(processor: Any) -> int:
    """Samples a second that the processor wants; ValueError if it takes no sounds."""
    ears = getattr(processor, "feature_extractor", None)
    if ears is None:
        raise ValueError(f"{type(processor).__name__} takes no sounds")
    return int(ears.sampling_rate)


def read_image(path: Path) -> Image:
    """An image file as RGB; ValueError for what Pillow cannot read."""
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    try:
        return Images.open(path).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read") from error


def read_sound(path: Path, rate: int) -> np.ndarray:
    """The mean of the channels of a 16-bit WAV file, float32 [samples] at `rate` a second.

    Raises ValueError for other files, and for another rate where scipy, which resamples, is
    missing.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, found = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is not a WAV file: {error}") from error
    if width != 2:
        raise ValueError(
            f"{path} has {8 * width} bits a sample, must have 16 "
            f"(ffmpeg -i in.mp3 -ac 1 -sample_fmt s16 out.wav)"
        )
    samples = np.frombuffer(data, "<i2").reshape(-1, channels).mean(1, dtype=np.float32) / 32768
    if found == rate:
        return samples
    resampled: np.ndarray = need("scipy.signal").resample_poly(samples, rate, found)
    return resampled.astype(np.float32)
