# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""An audio-language model that keeps its cache packed.

    python examples/audio.py Qwen/Qwen2-Audio-7B-Instruct --sound speech.wav

Any model that transformers loads as AutoModelForMultimodalLM and whose processor takes `audio`.
Without --sound it plays a tone to the model.
"""

from __future__ import annotations

import argparse
import wave
from typing import Any

import numpy as np
import oscar_kv
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor


def tone(rate: int, seconds: float = 2.0, pitch: float = 440.0) -> np.ndarray:
    """An A with two overtones, float32."""
    time = np.arange(int(rate * seconds)) / rate
    return (0.3 * sum(np.sin(2 * np.pi * pitch * n * time) / n for n in (1, 2, 3))).astype("f4")


def read_wav(path: str, rate: int) -> np.ndarray:
    """The first channel of a 16-bit PCM file, float32; ValueError for anything else."""
    with wave.open(path, "rb") as file:
        if file.getsampwidth() != 2 or file.getframerate() != rate:
            raise ValueError(
                f"{path} has {8 * file.getsampwidth()} bits at {file.getframerate()} Hz, must have "
                f"16 bits at {rate} Hz (ffmpeg -i in.mp3 -ar {rate} -ac 1 out.wav)"
            )
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, file.getnchannels())[:, 0].astype("f4") / 32768


def prompt(processor: Any, question: str) -> str:
    """One sound and a question, in the model's chat template."""
    content = [{"type": "audio", "audio_url": "sound.wav"}, {"type": "text", "text": question}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def main() -> None:
    """Answers the question and says what the cache held."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", help="name on the Hugging Face Hub, or a folder")
    options.add_argument("--sound", help="16-bit WAV file to listen to; without it a tone")
    options.add_argument("--question", default="What do you hear?")
    options.add_argument("--format", default="k2v2", help="k2v2, k4v2 or k4v4")
    options.add_argument("--new-tokens", type=int, default=64)
    asked = options.parse_args()

    processor = AutoProcessor.from_pretrained(asked.model)
    model = AutoModelForMultimodalLM.from_pretrained(asked.model, dtype="auto").eval()
    oscar_kv.enable(model, format=asked.format)

    rate = processor.feature_extractor.sampling_rate
    sound = read_wav(asked.sound, rate) if asked.sound else tone(rate)
    text = prompt(processor, asked.question)
    inputs = processor(text=text, audio=sound, sampling_rate=rate, return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
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
