# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""A vision-language model that keeps its cache packed.

    python examples/vision.py llava-hf/llava-1.5-7b-hf --image photo.jpg --question "What is this?"

Any model that transformers loads as AutoModelForImageTextToText and docs/models.md does not refuse.
Without --image it draws one.
"""

from __future__ import annotations

import argparse
from typing import Any

import oscar_kv
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor


def drawing() -> Image.Image:
    """A red disc on a blue square."""
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((32, 96, 160, 224), fill="blue")
    draw.ellipse((96, 32, 224, 160), fill="red")
    return image


def prompt(processor: Any, question: str) -> str:
    """One image and a question, in the model's chat template where it has one."""
    if processor.chat_template is None:
        return f"{processor.image_token}\n{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


def main() -> None:
    """Answers the question and says what the cache held."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", help="name on the Hugging Face Hub, or a folder")
    options.add_argument("--image", help="file to look at; without it one is drawn")
    options.add_argument("--question", default="What do you see in this picture?")
    options.add_argument("--format", default="k2v2", help="k2v2, k4v2 or k4v4")
    options.add_argument("--new-tokens", type=int, default=64)
    asked = options.parse_args()

    processor = AutoProcessor.from_pretrained(asked.model)
    model = AutoModelForImageTextToText.from_pretrained(asked.model, dtype="auto").eval()
    oscar_kv.enable(model, format=asked.format)

    image = Image.open(asked.image).convert("RGB") if asked.image else drawing()
    text = prompt(processor, asked.question)
    inputs = processor(text=text, images=image, return_tensors="pt").to(model.device, model.dtype)
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=asked.new_tokens, do_sample=False, return_dict_in_generate=True
        )
    answer = out.sequences[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True).strip())

    cache = out.past_key_values
    memory = cache.memory()
    print(
        f"{cache.get_seq_length()} tokens in {memory.total / 1e6:.2f} MB: "
        f"{memory.bits_per_element:.2f} bits an element"
    )


if __name__ == "__main__":
    main()
