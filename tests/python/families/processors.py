# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Processors made on the spot: a byte tokenizer, transformers' own image and audio processors.

The token layout of a prompt (placeholders, how often they are repeated, what stands around them) is
that of transformers' processor classes. Only video processors cannot be had without torchvision;
`Frames` stands in for them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VOCABULARY = 320  # 256 bytes and the special tokens of any family here
PAD = 256


def tokenizer(**special: str) -> Any:
    """One token a byte, `<pad>` and the special tokens by role, such as image_token="<image>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token) for token in ("<pad>", *special.values())])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", padding_side="left", extra_special_tokens=special
    )
    assert made.pad_token_id == PAD
    return made


def processor(kind: type, **parts: Any) -> Any:
    """A processor of class `kind`, which may have `Frames` for its video processor."""

    def accept(self: Any, name: str, argument: Any) -> type:
        return type(argument)

    loose = type(kind.__name__, (kind,), {"check_argument_for_proper_class": accept})
    return loose(**parts)


def picture(seed: int, width: int = 64, height: int = 48) -> Any:
    """A drawn image: rectangles of random colours on a gradient."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    image = Image.fromarray(np.tile(ramp[None, :, None], (height, 1, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = int(random.integers(width)), int(random.integers(height))
        color = tuple(int(part) for part in random.integers(256, size=3))
        draw.rectangle((x, y, x + width // 3, y + height // 3), fill=color)
    return image


def clip(seed: int, frames: int = 4) -> list[Any]:
    """A video of drawn frames."""
    return [picture(10 * seed + frame) for frame in range(frames)]


def tone(seconds: float = 1.0, pitch: float = 440.0, rate: int = 16000) -> np.ndarray:
    """A tone with two overtones and a slow tremolo, float32 at `rate` samples a second."""
    time = np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * n * time) / n for n in (1, 2, 3))
    return (0.3 * wave * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))).astype(np.float32)


class Frames:
    """What the video processors of Qwen's models give, from their image processor.

    A video is a list of frames, an even number of them; two of them make one step in time.
    """

    def __init__(self, images: Qwen2VLImageProcessorPil) -> None:
        self.images = images
        self.merge_size = images.merge_size
        self.temporal_patch_size = images.temporal_patch_size
        self.model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def fetch_videos(self, videos: Any, **_: Any) -> Any:
        """Nothing to load."""
        return videos

    def __call__(self, videos: Any, **_: Any) -> BatchFeature:
        patches, grids, metadata = [], [], []
        for video in videos:
            frames = [self.images(frame, return_tensors="pt") for frame in video]
            grid = frames[0]["image_grid_thw"][0]
            steps = [self._merged(*pair) for pair in zip(frames[::2], frames[1::2], strict=True)]
            patches += steps
            grids.append(torch.tensor([len(steps), int(grid[1]), int(grid[2])]))
            metadata.append(
                SimpleNamespace(fps=2.0, sampled_fps=2.0, frames_indices=list(range(len(video))))
            )
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat(patches),
                "video_grid_thw": torch.stack(grids),
                "video_metadata": metadata,
            }
        )

    def _merged(self, first: Any, second: Any) -> torch.Tensor:
        """The patches of two frames: the image processor repeats one frame in time instead."""
        size = (3, self.temporal_patch_size, -1)  # channel, time, pixel
        early, late = (x["pixel_values"].unflatten(1, size) for x in (first, second))
        return torch.stack([early[:, :, 0], late[:, :, 0]], 2).flatten(1)
