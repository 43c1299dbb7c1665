# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""A transformers pipeline, several chats at a time, with the cache packed.

    python examples/pipeline.py Qwen/Qwen3-0.6B "What is a KV cache?" "And what fills it?"

enable() changes the model's own generate(), so everything that calls it packs: pipelines, agents,
evaluation harnesses.
"""

from __future__ import annotations

import argparse

import oscar_kv
from transformers import pipeline


def main() -> None:
    """Answers each question."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", help="name on the Hugging Face Hub, or a folder")
    options.add_argument("questions", nargs="+")
    options.add_argument("--format", default="k2v2", help="k2v2, k4v2 or k4v4")
    options.add_argument("--new-tokens", type=int, default=128)
    asked = options.parse_args()

    chat = pipeline("text-generation", model=asked.model, dtype="auto")
    oscar_kv.enable(chat.model, format=asked.format)
    if chat.tokenizer.pad_token is None:
        chat.tokenizer.pad_token = chat.tokenizer.eos_token
    chat.tokenizer.padding_side = "left"
    batch = [[{"role": "user", "content": question}] for question in asked.questions]
    answers = chat(batch, batch_size=len(batch), max_new_tokens=asked.new_tokens, do_sample=False)
    for question, answer in zip(asked.questions, answers, strict=True):
        print(f"> {question}\n{answer[0]['generated_text'][-1]['content'].strip()}\n")


if __name__ == "__main__":
    main()
