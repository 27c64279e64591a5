"""`check_rule`, which runs all checks in all settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from opacus_bpclip.config import Bound
from opacus_bpclip.rules import RULES, Rule
from opacus_bpclip.testing.case import ROUNDING, Case
from opacus_bpclip.testing.layer import Inputs, MakeInputs
from opacus_bpclip.testing.promises import (
    check_attained,
    check_direction,
    check_empty,
    check_not_finite,
    check_spikes,
    check_sums,
)

# Allocation and `normalize`: joint and layerwise budgets, clipped and normalised.
_BUDGETS = (("joint", False), ("dimension", False), ("joint", True))


def check_rule(
    rule: type[Rule],
    make_layer: Callable[[], nn.Module],
    inputs: MakeInputs,
    *,
    worst_case: tuple[Tensor | Inputs, Tensor] | None = None,
    rounds: int = 3,
    seed: int = 0,
) -> None:
    """Search for a violation of a rule's promises, on random and on hostile batches.

    The promises are checked for all bounds and both budgets, clipped and normalised, in float32 and
    float64:

    - *bound*: an example's contribution is within the limit, with and without input clipping;
    - *independence*: a batch's gradient is the sum of its examples' contributions, and an example's
      output and the gradient of its input do not depend on the other examples;
    - *direction*: without input clipping, a contribution is the example's gradient by plain
      autograd times one factor, which is at most 1 unless gradients are normalised;
    - *attainment*: some example reaches 0.999 of the limit, so the bound is not too loose;
    - *not finite*: an example with inf or nan contributes zero and does not affect the others;
    - *empty batch*: the gradient is zero (if the layer itself accepts an empty batch).

    Args:
        rule: the rule's class; registered for the layer's class while the check runs.
        make_layer: makes the layer; must return the same kind of layer each time.
        inputs: makes the layer's arguments for the given number of examples, ``None`` for an
            argument that is left out; called under a fixed seed.
        worst_case: arguments and upstream gradient of one example that reaches the limit with every
            bound. By default it is searched among inputs and gradients with a single entry.
        rounds: the number of hostile batches in each setting.
        seed: the seed of the search.

    Raises:
        AssertionError: a promise is broken; the message says which one, in which setting, and by
            how much.

    Examples:
        >>> from opacus_bpclip.rules import LinearRule
        >>> check_rule(LinearRule, lambda: nn.Linear(3, 2), lambda n: torch.randn(n, 3), rounds=1)
    """
    with torch.random.fork_rng(devices=[]), _registered(rule, type(make_layer())):
        torch.manual_seed(seed)
        frozen = make_layer().state_dict()

        def same_layer() -> nn.Module:
            layer = make_layer()
            layer.load_state_dict(frozen)
            return layer

        for bound, (allocation, normalize), dtype in itertools.product(
            get_args(Bound), _BUDGETS, ROUNDING
        ):
            case = Case(rule, same_layer, bound, allocation, normalize, dtype)
            for _ in range(rounds):
                check_sums(case, inputs)
            check_direction(case, inputs)
            check_not_finite(case, inputs)
            check_empty(case, inputs)
            if dtype == torch.float64:
                check_attained(case, inputs, worst_case)
            if dtype == torch.float64 and not normalize:
                check_spikes(case, inputs)
                for part in case.with_one_frozen():
                    check_sums(part, inputs)


@contextmanager
def _registered(rule: type[Rule], kind: type[nn.Module]) -> Iterator[None]:
    before = RULES.get(kind)
    RULES[kind] = rule
    try:
        yield
    finally:
        if before is None:
            del RULES[kind]
        else:
            RULES[kind] = before
