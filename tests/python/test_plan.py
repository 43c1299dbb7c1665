# SPDX-FileCopyrightText: 2026 The oscar-kv authors
# SPDX-License-Identifier: Apache-2.0
"""Which layer of a step makes the attention plan, and which may use it."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from oscar_kv import PagedCache, ops
from oscar_kv.plan import SharedPlans, StepPlans


class Layer:
    pass


class Maker:
    """Numbers the plans that were asked for."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return self.made


def test_the_first_layer_plans_and_the_others_follow():
    plans, make, layers = SharedPlans(), Maker(), [Layer() for _ in range(3)]
    for step in (1, 2):
        assert [plans.plan("kind", step, layer, make) for layer in layers] == [step] * 3
    assert make.made == 2


def test_a_plan_of_another_step_is_not_used():
    plans, make, first, second = SharedPlans(), Maker(), Layer(), Layer()
    assert plans.plan("kind", 1, first, make) == 1
    assert plans.plan("kind", 2, second, make) is None
    assert make.made == 1


def test_the_leader_plans_again_in_the_same_step():
    """A graph may be captured of a step that was run before: its planning belongs into it."""
    plans, make, first, second = SharedPlans(), Maker(), Layer(), Layer()
    plans.plan("kind", 1, first, make)
    assert plans.plan("kind", 1, first, make) == 2
    assert plans.plan("kind", 1, second, make) == 2


def test_each_kind_of_layer_has_its_own_plan():
    plans, make, first, second = SharedPlans(), Maker(), Layer(), Layer()
    assert plans.plan("full", 1, first, make) == 1
    assert plans.plan("sliding", 1, second, make) == 2
    assert plans.plan("full", 1, second, make) == 1


def test_each_device_of_a_split_model_has_its_own_plan(monkeypatch):
    make = Maker()
    monkeypatch.setattr(ops, "plan_attend", lambda *args, **kwargs: make())
    plans, layers = SharedPlans(), [Layer() for _ in range(4)]
    start = torch.tensor([0, 1], dtype=torch.int32)
    found = []
    for layer, index in zip(layers, (0, 1, 0, 1), strict=True):
        q = SimpleNamespace(device=torch.device("cuda", index), shape=torch.Size((1, 4, 64)))
        given = (None, "kind", q, start, ("k2v2", 32, 4), 0, False, 1)
        found.append(StepPlans(plans, 1, layer).of(*given))
    assert found == [1, 2, 1, 2]


def test_where_the_leader_is_gone_the_next_one_leads():
    plans, make, first, second = SharedPlans(), Maker(), Layer(), Layer()
    plans.plan("kind", 1, first, make)
    del first
    assert plans.plan("kind", 1, second, make) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_plan_for_themselves(copied):
    plans, make, first = SharedPlans(), Maker(), Layer()
    plans.plan("kind", 1, first, make)
    other = copied(plans)
    assert other.plan("kind", 1, Layer(), make) == 2
    assert plans.plan("kind", 1, Layer(), make) == 1


def test_there_are_no_plans_on_the_cpu():
    plans, layer = SharedPlans(), Layer()
    cache = PagedCache(1, 2, 64, torch.float32)
    rows, q = torch.randn(1, 2, 64), torch.randn(1, 4, 64)
    start = torch.tensor([0, 1], dtype=torch.int32)
    given = (cache._arrays(), "kind", q, start, ("k2v2", 32, 4), 0, False, 1)
    assert StepPlans(plans, 1, layer).of(*given) is None
    out, _ = cache.attend(q, rows, rows, scale=0.125, plans=plans)
    assert torch.equal(out, cache.attend(q, rows, rows, scale=0.125)[0])
    with pytest.raises(TypeError, match="query_start is on cpu, plans are for CUDA devices"):
        ops.plan_attend(cache._arrays(), start, 1, 4, "k2v2", 32, 4)
