"""Which scheme each layer gets when the user states an error of the actions, not schemes.

Owns: the search behind `--scheme auto`. Must not know how a plan is written or run: it asks for
the error of a plan and gets a number. Must not import torch.

The search minimises the run time that the weights cost, subject to the error of the actions:

1. `sensitivity` gives every group of layers an error for each scheme, on the group alone.
2. Errors of different groups are taken as independent, so their squares add up; how much a
   section of the model (vision tower, language model, DiT blocks...) weighs in the actions is
   measured once, by quantising that section alone and running the policy:
   |error of the actions|**2 = sum over sections of w_section * sum over groups of error**2.
3. Under that model the cheapest plan for a given error is found group by group with one Lagrange
   multiplier (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
   1988), so a group becomes float where that buys most accuracy for its bytes.
4. The plan with every layer at its most accurate INT8 scheme is measured first: where it holds,
   nothing needs to be float.
5. The cheapest plan's actions are then measured. The limit is moved by what was found, and
   halved in between a limit that held and one that did not, until the measured error is within
   the budget and uses most of it.

The model only proposes; what is returned has been measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.quantization import LayerScheme
from offline_tools.quantize.sensitivity import Group

# Graph -> layer -> scheme. Layers that are not named are float.
GraphPlans = dict[str, dict[str, LayerScheme]]
# Gives the error of a plan as a share of the budget: at most 1 is within it.
Judge = Callable[[GraphPlans], float]
# First layer of each group to its scheme; None is float.
_Choice = dict[str, LayerScheme | None]

# What a layer's weight costs at run time, relative to a static INT8 layer: a half-precision weight
# has twice the bytes; finding each row's maximum and migrating are small kernels that are fused
# with others, a rotation is a small product of its own. Among INT8 schemes little but the order
# matters, and that is by construction.
_STATIC, _MIGRATION, _ROW, _ROTATION, _FLOAT = 1.0, 0.005, 0.02, 0.05, 2.0

# A plan that uses this share of the budget is good enough to stop at.
_GOOD_SHARE = 0.95
# Aim below the budget: between two sets of samples the error varies by a few per cent.
_AIM = 0.95
# Predicted squared errors that differ by less are not told apart.
_CLOSE = 1.05


@dataclass(frozen=True)
class Found:
    """What the search returned.

    Attributes:
        plans: Graph to its plan.
        share: Measured error as a share of the budget.
        evaluations: How often actions were measured.
    """

    plans: GraphPlans
    share: float
    evaluations: int


def cost(scheme: LayerScheme | None) -> float:
    """Return the run-time cost of a parameter under a scheme; None is float."""
    if scheme is None:
        return _FLOAT
    spent = _STATIC + (_ROW if scheme.activation == "row" else 0.0)
    spent += 0.0 if scheme.migration_alpha is None else _MIGRATION
    return spent + (0.0 if scheme.rotation is None else _ROTATION)


def section(group: Group) -> str:
    """Return the part of the model that a group belongs to: its name up to the first number."""
    parts = list(itertools.takewhile(lambda part: not part.isdigit(), group.name.split(".")))
    return ".".join([group.graph, *parts[:3]])


def search(
    groups: Sequence[Group],
    weights: Mapping[str, float],
    judge: Judge,
    report: Callable[[str], None],
    max_evaluations: int = 8,
) -> Found:
    """Find a cheap plan whose actions are within the budget.

    Args:
        groups: With their local errors.
        weights: What `section_weights` gave.
        judge: Measures a plan.
        report: Called with a line of progress at a time.
        max_evaluations: Plans to measure at most.

    Raises:
        QuantizationError: No plan with an INT8 layer was found within the budget.
    """
    tried: dict[tuple[LayerScheme | None, ...], float] = {}

    def measured(choice: _Choice) -> float:
        key = tuple(choice.values())
        if key not in tried:
            share = tried[key] = judge(_plans(groups, choice))
            int8 = sum(g.parameters for g in groups if choice[g.name] is not None)
            total = sum(g.parameters for g in groups)
            report(
                f"plan {len(tried)}: {100 * int8 / total:.1f} % of the weights in INT8, error at "
                f"{100 * share:.0f} % of the budget"
            )
        return tried[key]

    def spent(choice: _Choice) -> float:
        return sum(cost(choice[group.name]) * group.parameters for group in groups)

    best: _Choice | None = None
    every_best: _Choice = {group.name: group.best for group in groups}
    if measured(every_best) <= 1.0:
        best = every_best
    cheapest = _choose(groups, weights, 0.0)
    # Predicted errors that held and that did not; the plan to be found lies between them.
    limit, held, missed = _AIM**2, 0.0, math.inf
    while len(tried) < max_evaluations and missed > held * _CLOSE:
        choice = _cheapest(groups, weights, limit)
        if all(scheme is None for scheme in choice.values()):
            break
        if best is not None and spent(choice) >= spent(best):
            # Dearer than what is known to hold: there is nothing to learn from it.
            held = limit
            if choice == cheapest:
                break
            limit = math.sqrt(held * missed) if missed < math.inf else held * 4.0
            continue
        share = measured(choice)
        if share <= 1.0:
            best, held = choice, max(held, limit)
            if share >= _GOOD_SHARE or choice == cheapest:
                break
        else:
            missed = min(missed, limit)
        limit *= (_AIM / share) ** 2 if 0.0 < share < math.inf else 1.0 / 16.0
        if not held < limit < missed:
            limit = math.sqrt(held * missed) if held > 0.0 else missed / 4.0
    if best is None:
        raise QuantizationError(
            f"no plan with an INT8 layer stays within the budget: the best of "
            f"{len(tried)} plans reached {min(tried.values()):.2f} times the budget. Raise "
            "--budget or --max-joint-error, calibrate on more samples, or take the most sensitive "
            "layers out with --layers '!PATTERN'."
        )
    return Found(_plans(groups, best), measured(best), len(tried))


def section_weights(
    groups: Sequence[Group], judge: Judge, report: Callable[[str], None]
) -> dict[str, float]:
    """Measure how much each section's local errors weigh in the actions.

    Args:
        groups: With their local errors.
        judge: Measures a plan.
        report: Called with a line of progress at a time.

    Returns:
        Section to the factor from its sum of squared local errors to the square of `judge`.
    """
    sections: dict[str, list[Group]] = {}
    for group in groups:
        sections.setdefault(section(group), []).append(group)
    weights = {}
    for name, members in sections.items():
        choice: dict[str, LayerScheme | None] = {group.name: group.best for group in members}
        share = judge(_plans(members, choice))
        local = sum(group.errors[group.best] ** 2 for group in members)
        weights[name] = share**2 / local if local > 0.0 else 0.0
        report(f"{name}: alone at its best it takes {100 * share:.0f} % of the budget")
    return weights


def _cheapest(groups: Sequence[Group], weights: Mapping[str, float], limit: float) -> _Choice:
    """Return the cheapest choice whose predicted squared error does not exceed a limit."""
    low, high = 0.0, 1.0
    if _predicted(groups, weights, _choose(groups, weights, 0.0)) <= limit:
        return _choose(groups, weights, 0.0)
    while _predicted(groups, weights, _choose(groups, weights, high)) > limit:
        low, high = high, high * 8.0
    # The multiplier's own precision: far more steps than there are plans to tell apart.
    for _ in range(100):
        middle = (low + high) / 2.0
        if _predicted(groups, weights, _choose(groups, weights, middle)) > limit:
            low = middle
        else:
            high = middle
    return _choose(groups, weights, high)


def _choose(groups: Sequence[Group], weights: Mapping[str, float], multiplier: float) -> _Choice:
    """Minimise cost + multiplier * error**2, group by group."""
    total = sum(group.parameters for group in groups)

    def price(group: Group, scheme: LayerScheme | None) -> tuple[float, float]:
        spent = cost(scheme) * group.parameters / total
        loss = 0.0 if scheme is None else weights[section(group)] * group.errors[scheme] ** 2
        # Of two equal prices the smaller error.
        return spent + multiplier * loss, loss

    return {
        group.name: min((*group.errors, None), key=lambda scheme: price(group, scheme))
        for group in groups
    }


def _predicted(
    groups: Sequence[Group],
    weights: Mapping[str, float],
    choice: Mapping[str, LayerScheme | None],
) -> float:
    loss = 0.0
    for group in groups:
        scheme = choice[group.name]
        if scheme is not None:
            loss += weights[section(group)] * group.errors[scheme] ** 2
    return loss


def _plans(groups: Sequence[Group], choice: Mapping[str, LayerScheme | None]) -> GraphPlans:
    plans: GraphPlans = {}
    for group in groups:
        scheme = choice[group.name]
        plan = plans.setdefault(group.graph, {})
        if scheme is not None:
            plan.update((layer.name, scheme) for layer in group.layers)
    return plans
