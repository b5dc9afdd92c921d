"""Which scheme each layer gets when the user states an error of the actions, not schemes.

Owns: the search behind `--scheme auto`. Must not know how a plan is written or run: it asks for
the error of a plan and gets a number. Must not import torch.

INT8 first, then accuracy, then the cheaper kernel:

1. `sensitivity` gives every group of layers an error for each scheme, on the group alone. Errors
   of different groups are taken as independent, so their squares add up; how much a section of
   the model (vision tower, language model, DiT blocks...) weighs in the actions is measured once,
   by quantising that section alone and running the policy.
2. Plans with every layer in INT8 are measured: each group's own choice, the same without static
   scales, and each uniform scheme that the model of step 1 does not rule out. The best that holds
   is the result, so a search never returns a worse plan than the best uniform scheme; of errors
   that are not told apart the cheaper plan. A static scale, which saves a row's maximum at run
   time, is taken only where it is as accurate: it is set by the calibration set and fails where a
   later observation leaves its range, while a row's own maximum cannot.
3. Where none holds, the best of them gives up layers for float in the order of the error that a
   byte of float buys (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
   quantizers", 1988: with two choices a group their multiplier is this ratio). How many layers
   it takes is bisected on measured errors. A group that breaks the budget alone, whatever the
   model says of it, goes first.
4. What is found is checked on observations that the search has not seen. How the two differ sets
   how strict the search is when it goes on, in both directions.

The model only proposes; what is returned has been measured and checked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from groot_int8_ros.errors import QuantizationError
from groot_int8_ros.policy.quantization import LayerScheme
from offline_tools.quantize.sensitivity import Group

# Graph -> layer -> scheme. Layers that are not named are float.
GraphPlans = dict[str, dict[str, LayerScheme]]
# Gives the error of a plan as a share of the budget: at most 1 is within it.
Judge = Callable[[GraphPlans], float]
# First layer of each group to its scheme; None is float.
_Choice = dict[str, LayerScheme | None]

# What an INT8 layer costs at run time beyond its product: finding each row's maximum and migrating
# are small kernels that are fused with others, a rotation is a small product of its own. Only the
# order matters, and that is by construction.
_MIGRATION, _ROW, _ROTATION = 1, 2, 4

# Errors that differ by less are not told apart: the cheaper scheme is taken.
_CLOSE = 1.05
# A plan is not measured if its predicted error is so many times the best one's; measured errors
# of plans of equal predicted error differ by a fifth.
_HOPELESS = 1.5
# The search stops at a plan that uses this share of the budget, and a guess aims at a little more.
_GOOD_SHARE, _AIM = 0.9, 0.95
# So many plans that miss although the model says that they hold cast a doubt on the model.
_PATIENCE = 2
# How often a plan is checked on unseen observations at most: each check tells the search something
# about them.
_CHECKS = 4


@dataclass(frozen=True)
class Found:
    """What the search returned.

    Attributes:
        plans: Graph to its plan.
        share: Its error on unseen observations as a share of the budget.
        evaluations: How often actions were measured, checks aside.
    """

    plans: GraphPlans
    share: float
    evaluations: int


def cost(scheme: LayerScheme) -> int:
    """Return where a scheme stands in the order of run-time costs."""
    return (
        (_ROW if scheme.activation == "row" else 0)
        + (0 if scheme.migration_alpha is None else _MIGRATION)
        + (0 if scheme.rotation is None else _ROTATION)
    )


def section(group: Group) -> str:
    """Return the part of the model that a group belongs to: its name up to the first number."""
    parts = list(itertools.takewhile(lambda part: not part.isdigit(), group.name.split(".")))
    return ".".join([group.graph, *parts[:3]])


def search(
    groups: Sequence[Group],
    weights: Mapping[str, float],
    judge: Judge,
    check: Judge,
    report: Callable[[str], None],
    max_evaluations: int = 16,
) -> Found:
    """Find a plan whose actions are within the budget, with as many weights in INT8 as fit it.

    Args:
        groups: With their local errors.
        weights: What `section_weights` gave.
        judge: Measures a plan on the observations of the search.
        check: Measures it on others.
        report: Called with a line of progress at a time.
        max_evaluations: Plans to measure at most.

    Raises:
        QuantizationError: No plan with an INT8 layer was found within the budget.
    """
    return _Search(groups, weights, judge, check, report, max_evaluations).run()


@dataclass
class _Search:
    """One run of `search`."""

    groups: Sequence[Group]
    weights: Mapping[str, float]
    judge: Judge
    check: Judge
    report: Callable[[str], None]
    max_evaluations: int
    measured: dict[tuple[LayerScheme | None, ...], float] = field(default_factory=dict)
    checked: dict[tuple[LayerScheme | None, ...], float] = field(default_factory=dict)

    def run(self) -> Found:
        full = self._full_plans()
        for choice in full:
            if self._share(choice) <= 1.0 and self._checked(choice) <= 1.0:
                return self._found(choice)
            if len(self.checked) >= _CHECKS // 2:
                break  # the other checks are for plans with float layers
        reached = [max(self._share(one), self.checked.get(_key(one), 0.0)) for one in full]
        close = [
            one for one, share in zip(full, reached, strict=True) if share <= _CLOSE * min(reached)
        ]
        base = min(close, key=self._predicted)
        found = self._with_float_layers(base)
        if found is None:
            reached = [*self.measured.values()] if not self.checked else [*self.checked.values()]
            where = "" if not self.checked else " on observations that the search had not seen"
            raise QuantizationError(
                f"no plan with an INT8 layer stays within the budget: the best of "
                f"{len(self.measured)} plans reached {min(reached):.2f} times the budget{where}. "
                "Raise --budget or --max-joint-error, calibrate on more samples, or take the most "
                "sensitive layers out with --layers '!PATTERN'."
            )
        return self._found(found)

    def _full_plans(self) -> list[_Choice]:
        """Return measured plans with every layer in INT8, the best first."""
        by_row = {
            group.name: [s for s in group.errors if s.activation == "row"] for group in self.groups
        }
        plans: list[_Choice] = [
            {group.name: _cheapest(group, [*group.errors]) for group in self.groups},
            {group.name: _cheapest(group, by_row[group.name]) for group in self.groups},
        ]
        kinds = dict.fromkeys(_kind(s) for group in self.groups for s in group.errors)
        plans += [{g.name: _of_kind(g, kind) for g in self.groups} for kind in kinds]
        limit = _HOPELESS * min(self._predicted(plan) for plan in plans)
        kept = {_key(plan): plan for plan in plans if self._predicted(plan) <= limit}
        tried = sorted(kept.values(), key=self._predicted)
        tried = tried[: max(1, self.max_evaluations // 2)]
        close = _CLOSE * min(self._share(plan) for plan in tried)
        return sorted(
            tried,
            key=lambda plan: (
                (0, self._cost(plan)) if self._share(plan) <= close else (1, self._share(plan))
            ),
        )

    def _with_float_layers(self, base: _Choice) -> _Choice | None:
        """Return the first part of a chain from a plan to float that holds when checked."""
        order = sorted(
            self.groups,
            key=lambda group: self._loss(group, base) / group.parameters,
            reverse=True,
        )
        while True:
            chain = [
                base | dict.fromkeys([group.name for group in order[:count]])
                for count in range(len(order))
            ]
            found = self._held(chain)
            alone = self.measured.get(_key(chain[-1]), 0.0)
            if found is not None or alone <= 1.0 or len(self.measured) >= self.max_evaluations:
                return found
            # The model ranks this group last, and the actions say that it alone breaks the budget.
            order.insert(0, order.pop())

    def _held(self, chain: Sequence[_Choice]) -> _Choice | None:
        """Return the first plan of a chain that holds when checked, as far as the checks go."""
        best: int | None = None
        strictness = self._strictness(chain[0])
        while len(self.checked) < _CHECKS:
            count = self._bisect(chain, strictness)
            if count is None:
                break
            if _key(chain[count]) in self.checked:
                break  # nothing new to be learnt
            share = self._checked(chain[count])
            if share <= 1.0:
                best = count if best is None else min(best, count)
                if share >= _GOOD_SHARE or count == 0:
                    break
            strictness = self._strictness(chain[count])
        return None if best is None else chain[best]

    def _bisect(self, chain: Sequence[_Choice], strictness: float) -> int | None:
        """Return the fewest groups in float at which the measured error holds; None: nothing."""
        while True:
            known = {
                count: self.checked.get(_key(choice), self.measured[_key(choice)] * strictness)
                for count, choice in enumerate(chain)
                if _key(choice) in self.measured
            }
            held = min((n for n, share in known.items() if share <= 1.0), default=len(chain))
            missed = max((n for n in known if n < held), default=-1)
            good = held < len(chain) and known[held] >= _GOOD_SHARE
            if good or held - missed <= 1 or len(self.measured) >= self.max_evaluations:
                return held if held < len(chain) else None
            # From the nearest that missed, as far as the model says that it takes.
            start = known.get(missed, math.inf)
            aim = 0.0 if math.isinf(start) else self._predicted(chain[missed]) * _AIM / start
            guess = next(
                (n for n, choice in enumerate(chain) if self._predicted(choice) <= aim), held
            )
            if held == len(chain) and self._lost(chain, known):
                guess = held - 1
            if not missed < guess < held:
                guess = (missed + held) // 2
            self._share(chain[guess])

    def _lost(self, chain: Sequence[_Choice], known: Mapping[int, float]) -> bool:
        """Return whether only the end of a chain is left to be tried, where nothing of it holds.

        Where the model did not help twice, what is left may hold a group that it takes for
        harmless. A plan that held until a check asked for more says that there is none.
        """
        none_held = all(self.measured[_key(chain[count])] > 1.0 for count in known)
        tried = sum(count > 0 for count in known)
        return (none_held and tried >= _PATIENCE) or len(self.measured) == self.max_evaluations - 1

    def _strictness(self, choice: _Choice) -> float:
        """Return what a check says of a plan over what the search says."""
        share = self._share(choice)
        checked = self.checked.get(_key(choice), share)
        return checked / share if 0.0 < share < math.inf and checked < math.inf else 1.0

    def _share(self, choice: _Choice) -> float:
        if _key(choice) not in self.measured:
            share = self.measured[_key(choice)] = self.judge(_plans(self.groups, choice))
            self._say(f"plan {len(self.measured)}", choice, share)
        return self.measured[_key(choice)]

    def _checked(self, choice: _Choice) -> float:
        if _key(choice) not in self.checked:
            share = self.checked[_key(choice)] = self.check(_plans(self.groups, choice))
            self._say("on unseen observations", choice, share)
        return self.checked[_key(choice)]

    def _say(self, what: str, choice: _Choice, share: float) -> None:
        int8 = sum(group.parameters for group in self.groups if choice[group.name] is not None)
        total = sum(group.parameters for group in self.groups)
        self.report(
            f"{what}: {100 * int8 / total:.1f} % of the weights in INT8, error at "
            f"{100 * share:.0f} % of the budget"
        )

    def _loss(self, group: Group, choice: _Choice) -> float:
        scheme = choice[group.name]
        return 0.0 if scheme is None else self.weights[section(group)] * group.errors[scheme] ** 2

    def _cost(self, choice: _Choice) -> int:
        chosen = ((choice[group.name], group.parameters) for group in self.groups)
        return sum(cost(scheme) * size for scheme, size in chosen if scheme is not None)

    def _predicted(self, choice: _Choice) -> float:
        return math.sqrt(sum(self._loss(group, choice) for group in self.groups))

    def _found(self, choice: _Choice) -> Found:
        plans = _plans(self.groups, choice)
        return Found(plans, self.checked[_key(choice)], len(self.measured))


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
        choice: _Choice = {group.name: group.best for group in members}
        share = judge(_plans(members, choice))
        local = sum(group.errors[group.best] ** 2 for group in members)
        weights[name] = share**2 / local if local > 0.0 else 0.0
        report(f"{name}: alone at its best it takes {100 * share:.0f} % of the budget")
    return weights


def _cheapest(group: Group, schemes: Sequence[LayerScheme]) -> LayerScheme | None:
    """Return the cheapest of the schemes that are as accurate as the best of them."""
    limit = _CLOSE * min((group.errors[scheme] for scheme in schemes), default=math.inf)
    close = [scheme for scheme in schemes if group.errors[scheme] <= limit]
    return min(close, key=lambda scheme: (cost(scheme), group.errors[scheme]), default=None)


def _kind(scheme: LayerScheme) -> tuple[LayerScheme, bool]:
    """Return what is alike in a uniform plan: all but a rotation's block, the width's matter."""
    return replace(scheme, rotation=None), scheme.rotation is not None


def _of_kind(group: Group, kind: tuple[LayerScheme, bool]) -> LayerScheme | None:
    """Return a group's scheme of a kind; without the rotation where its width allows none."""
    kinds = {_kind(scheme): scheme for scheme in group.errors}
    return kinds.get(kind, kinds.get((kind[0], False)))


def _key(choice: _Choice) -> tuple[LayerScheme | None, ...]:
    return tuple(choice.values())


def _plans(groups: Sequence[Group], choice: Mapping[str, LayerScheme | None]) -> GraphPlans:
    plans: GraphPlans = {}
    for group in groups:
        scheme = choice[group.name]
        plan = plans.setdefault(group.graph, {})
        if scheme is not None:
            plan.update((layer.name, scheme) for layer in group.layers)
    return plans
