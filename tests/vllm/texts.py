# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Token ids of real text for the engine: the language reference that comes with every Python."""

from __future__ import annotations

import functools
import pydoc_data.topics

import engine


@functools.cache
def _all():
    from transformers import AutoTokenizer

    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return tuple(AutoTokenizer.from_pretrained(engine.MODEL)(text, verbose=False).input_ids)


def prompts(lengths, start=0):
    """One piece of text for each length, one after the other, so that none begins like another."""
    ids, result, first = _all(), [], start
    for length in lengths:
        first = first % (len(ids) - length)
        result.append(list(ids[first : first + length]))
        first += length
    return result
