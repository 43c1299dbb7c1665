# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Every family reading packed history: against its own attention on dequantised K and V, and the
bytes that are held."""

from __future__ import annotations

import copy
from typing import Any

import torch
from catalogue import FAMILIES, each
from family import Family
from models import backend, enabled
from oscar_kv import _core
from oscar_kv.hf.layer import OscarLayer
from running import TOLERANCE, fresh_cache, read, step

WORDS = torch.tensor([[9, 4, 7]])


def packed_state(family: Family) -> tuple[Any, Any, Any]:
    """(cache after a prompt of five tiles or more, our part of it, what comes with a step)"""
    inputs = family.built.cases["long"]()
    cache, ours = fresh_cache(family)
    read(family, inputs, cache)
    ours.commit()  # where layers share K and V they wait for the next step
    return cache, ours, inputs if family.is_encoder_decoder else {}


@each(FAMILIES)
def test_fused_equals_dequantise_then_attend(family: Family) -> None:
    model = family.built.model
    with backend("reference"):
        with enabled(model):
            cache, ours, rest = packed_state(family)
            assert ours.get_seq_length() >= 192
            fused = step(family, rest, copy.deepcopy(cache), WORDS)
        assert ours.dequantizations == 0
        dense = step(family, rest, cache, WORDS)  # the model's own attention function
    # From one and the same state nothing is packed anew: only float noise remains.
    torch.testing.assert_close(fused, dense, rtol=0, atol=TOLERANCE)
    assert ours.dequantizations > 0


@each(FAMILIES)
def test_one_flipped_bit_shows(family: Family) -> None:
    """The comparison above looks at the packed bytes: a sign bit of one code changes the result."""
    with backend("reference"), enabled(family.built.model):
        cache, ours, rest = packed_state(family)
        right = step(family, rest, copy.deepcopy(cache), WORDS)
        layer = ours.layers[ours.survey.packed[0]]
        assert isinstance(layer, OscarLayer) and layer.paged is not None
        pages = layer.paged.pool.storage
        pages[..., :64] ^= 0xAA  # some codes of the keys of every tile
        wrong = step(family, rest, cache, WORDS)
    assert (wrong - right).abs().max() > 10 * TOLERANCE


def bytes_reachable(root: Any) -> int:
    """Bytes of every tensor storage that `root` leads to through attributes and containers."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif type(item).__module__.startswith(("oscar_kv", "transformers.cache_utils")):
            waiting += getattr(item, "__dict__", {}).values()
    return sum(storages.values())


@each(FAMILIES)
def test_what_is_held(family: Family) -> None:
    """Packed pages as the format says, and nothing dense besides what memory() reports."""
    with enabled(family.built.model):
        _, ours, _ = packed_state(family)
    memory, pages = ours.memory(), 0
    for index in ours.survey.packed:
        paged = ours.layers[index].paged
        count = -(-(paged.lengths[0] // 32 * 32) // paged.page_tokens)
        tile = _core.tile_bytes(paged.head_dim, "k2v2")
        pages += count * paged.page_tokens // 32 * paged.kv_heads * tile
    assert memory.packed == pages
    assert memory.pending == 0
    # memory() leaves out the row offsets of the latest call, a few bytes a layer.
    assert 0 <= bytes_reachable(ours) - memory.total <= 8 * len(ours.survey.packed)
