"""The search keeps the budget by measurement, however wrong its own model of the errors is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.quantization import LayerScheme
from offline_tools.quantize.layers import Layer
from offline_tools.quantize.search import GraphPlans, cost, search, section, section_weights
from offline_tools.quantize.sensitivity import Group

STATIC, ROW = LayerScheme("static", "max"), LayerScheme("row")


def _group(name: str, static: float, row: float, size: int = 10) -> Group:
    layer = Layer(name, (f"{name}/MatMul",), "MatMul", (f"{name}.x",), f"{name}.w", size, size, 1)
    return Group("dit", (layer,), {STATIC: static, ROW: row})


GROUPS = [
    _group("blocks.0.q", 0.010, 0.009),
    _group("blocks.1.q", 0.011, 0.009),
    _group("blocks.2.q", 0.9, 0.012),  # a massive token: row mends it
    _group("blocks.3.q", 0.9, 0.5),  # nothing mends it
    _group("head.proj", 0.01, 0.01),
]


def _judge(weight_of: Callable[[str], float] = lambda _: 1.0) -> Callable[[GraphPlans], float]:
    """Errors that add up in squares, each layer with a weight of its own."""
    by_name = {group.name: group for group in GROUPS}

    def judge(plans: GraphPlans) -> float:
        loss = sum(
            (weight_of(name) * by_name[name].errors[scheme]) ** 2
            for plan in plans.values()
            for name, scheme in plan.items()
        )
        return math.sqrt(loss) / 0.025

    return judge


def _search(judge: Callable[[GraphPlans], float], evaluations: int = 12) -> dict[str, LayerScheme]:
    weights = section_weights(GROUPS, judge, lambda _: None)
    found = search(GROUPS, weights, judge, lambda _: None, evaluations)
    assert judge(found.plans) <= 1.0
    assert found.share == pytest.approx(judge(found.plans))
    assert found.evaluations <= evaluations
    return found.plans["dit"]


def test_each_layer_gets_the_cheapest_scheme_that_it_can_bear() -> None:
    plan = _search(_judge())
    assert plan["blocks.0.q"] == STATIC
    assert plan["blocks.2.q"] == ROW
    assert "blocks.3.q" not in plan


def test_all_layers_are_static_where_that_is_within_the_budget() -> None:
    plan = _search(lambda plans: 0.01 * _judge()(plans))
    assert set(plan.values()) == {STATIC}
    assert len(plan) == len(GROUPS)


def test_the_budget_holds_where_the_model_of_the_errors_is_wrong() -> None:
    # One block weighs a hundred times what its section's average says.
    plan = _search(_judge(lambda name: 100.0 if name == "blocks.1.q" else 1.0))
    assert "blocks.1.q" not in plan
    assert plan


def test_a_plan_whose_actions_are_not_finite_is_not_taken() -> None:
    def judge(plans: GraphPlans) -> float:
        overflows = any("blocks.3.q" in plan for plan in plans.values())
        return math.inf if overflows else _judge()(plans)

    weights = {"dit.blocks": 1e3, "dit.head.proj": 1e3}
    found = search(GROUPS, weights, judge, lambda _: None, 12)
    assert "blocks.3.q" not in found.plans["dit"]


def test_an_unreachable_budget_is_refused_with_what_was_reached() -> None:
    def judge(plans: GraphPlans) -> float:
        return 3.0 if any(plans.values()) else 0.0

    weights = section_weights(GROUPS, judge, lambda _: None)
    with pytest.raises(QuantizationError, match=r"best of \d plans reached 3.00 times the budget"):
        search(GROUPS, weights, judge, lambda _: None, 4)


def test_schemes_cost_in_the_order_of_their_run_time() -> None:
    schemes = [
        STATIC,
        LayerScheme("static", "max", 0.5),
        ROW,
        LayerScheme("row", None, 0.5),
        LayerScheme("row", None, None, 64),
        LayerScheme("row", None, 0.5, 64),
        None,
    ]
    costs = [cost(scheme) for scheme in schemes]
    assert costs == sorted(set(costs))


def test_sections_are_the_parts_of_the_model() -> None:
    assert section(_group("transformer_blocks.12.attn1.to_q", 1, 1)) == "dit.transformer_blocks"
    assert section(_group("a.b.c.d.0.q", 1, 1)) == "dit.a.b.c"
