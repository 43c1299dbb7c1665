# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the laboratory on the pretended device and prints, as JSON, what went wrong where.

Of test_eval_device.py, in a process of its own.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from models import prompt, tiny
from oscar_kv.eval.codec import Codec, LayerInput
from oscar_kv.eval.formats import make_format
from oscar_kv.eval.generation import sample
from oscar_kv.eval.kl import Document, evaluate
from oscar_kv.eval.modality import ModalityStress
from oscar_kv.eval.stress import stressed, with_offsets
from pretend_device import NAME, Pretend
from test_eval_codec import every_codec, layer_input
from torch import Tensor


def moved(layer: LayerInput) -> LayerInput:
    values = {one.name: getattr(layer, one.name) for one in fields(layer)}
    return replace(
        layer, **{name: x.to(NAME) for name, x in values.items() if isinstance(x, Tensor)}
    )


def codec(make: Callable[[], Codec]) -> None:
    """The same codes, masks and bits as on the CPU."""
    layer = layer_input(tokens=600, prompt=300, head_dim=64, kv_heads=4)
    here, there = make().encode(layer), make().encode(moved(layer))
    for name in ("k", "v", "k_packed", "v_packed"):
        found = getattr(there, name)
        assert found.device.type == NAME, f"{name} is on {found.device}"
        assert torch.equal(found.cpu(), getattr(here, name)), f"{name} differs"
    assert here.extra_bits == there.extra_bits


def documents(family: str) -> None:
    """The same figures as on the CPU, through a model that was moved."""
    formats = [make_format(name) for name in ("int4", "kivi:g=32,r=64", "paper")]
    document = Document("one", "file", prompt(200))
    model = tiny(family)
    here = evaluate(model, [document], formats, 90)
    there = evaluate(model.to(NAME), [document], formats, 90)
    for one, other in zip(here, there, strict=True):
        (a,), (b,) = one.documents, other.documents
        torch.testing.assert_close(a.kl, b.kl, rtol=1e-3, atol=1e-6)
        assert one.bits == other.bits and float(a.kl.mean()) > 1e-4


def generation() -> None:
    model = tiny("qwen2")
    here = sample(model, prompt(40), 12, seed=3)
    assert torch.equal(here, sample(model.to(NAME), prompt(40), 12, seed=3))


def stresses() -> None:
    model = tiny("qwen2").to(NAME)
    for one in (stressed(model, 6.0), with_offsets(model, 30.0, value_offset=5.0)):
        assert all(x.device.type == NAME for x in one.parameters())


def main() -> None:
    checks: dict[str, Callable[[], Any]] = {
        spec: lambda spec=spec: codec(lambda: make_format(spec)) for spec in every_codec()
    }
    checks["modality"] = lambda: codec(lambda: ModalityStress(make_format("kivi"), 4.0))
    checks["turboquant:product=1"] = lambda: codec(lambda: make_format("turboquant:product=1"))
    for family in ("llama", "gemma3"):
        checks[f"evaluate {family}"] = lambda family=family: documents(family)
    checks |= {"generation": generation, "stress": stresses}
    found = {}
    with Pretend():
        for name, check in checks.items():
            try:
                check()
                found[name] = ""
            except Exception:
                found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
