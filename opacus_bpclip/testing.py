"""`check_rule`: everything that a rule must keep, tried on a layer of yours.

For authors of rules, in a test of their own; every rule of the package goes through it as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from opacus_bpclip.config import BackpropClipping, Bound, Upstream
from opacus_bpclip.grad_sample_module import BackpropClipHooks
from opacus_bpclip.rules import RULES, Rule

# What cancellation in a sum of contributions may add, relative to the sensitivity.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}
_SCALES = (1e-30, 1e-3, 1.0, 1e3, 1e30)
_LIMIT = 0.7

Inputs = tuple[Tensor | None, ...]  # None for an argument that is left out
MakeInputs = Callable[[int], "Tensor | Inputs"]


@dataclass(frozen=True)
class _Case:
    """One setting that the rule is tried in; its text stands in every message."""

    rule: type[Rule]
    make_layer: Callable[[], nn.Module]
    bound: str
    upstream: str
    dtype: torch.dtype
    max_input_norm: float | None = 3.0

    def __str__(self) -> str:
        return (
            f"{self.rule.__name__} with bound={self.bound!r}, upstream={self.upstream!r}, "
            f"max_input_norm={self.max_input_norm}, {self.dtype}"
        )


def check_rule(
    rule: type[Rule],
    make_layer: Callable[[], nn.Module],
    inputs: MakeInputs,
    *,
    worst_case: tuple[Tensor | Inputs, Tensor] | None = None,
    rounds: int = 3,
    seed: int = 0,
) -> None:
    """Search for a violation of what a rule promises, on random and on hostile batches.

    Checked in all bounds and both upstream modes, in float32 and float64:

    - *bound*: an example's contribution is within the limit, input clipping on or off;
    - *independence*: a batch's gradient is the sum of what its examples contribute alone;
    - *direction*: a contribution is the example's own gradient by plain autograd, times one factor,
      which ``upstream="clip"`` keeps at or below 1 (without input clipping);
    - *attainment*: some example reaches 0.999 of the limit, so the bound is not idle;
    - *not finite*: an example with inf or nan contributes exactly zero, the others are untouched;
    - *empty batch*: the gradient is zero (where the layer itself can run on one).

    Args:
        rule: the rule's class; registered for the layer's class while the check runs.
        make_layer: makes the layer, the same one each time.
        inputs: makes the layer's arguments for that many examples, ``None`` for one that is left
            out; called under a fixed seed.
        worst_case: arguments and upstream gradient of one example that reaches the limit of every
            bound; searched among single spikes if left out.
        rounds: hostile batches in each setting.
        seed: of the search.

    Raises:
        AssertionError: a promise is broken; the message says which, where and by how much.

    Example:
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

        for bound, upstream, dtype in itertools.product(
            get_args(Bound), get_args(Upstream), _ROUNDING
        ):
            case = _Case(rule, same_layer, bound, upstream, dtype)
            for _ in range(rounds):
                _check_sums(case, inputs)
            _check_direction(case, inputs)
            _check_not_finite(case, inputs)
            _check_empty(case, inputs)
            if dtype == torch.float64:
                _check_attained(case, inputs, worst_case)


class _Layer:
    """A layer with clipping attached, and its gradients on demand."""

    def __init__(self, case: _Case, limit: float = _LIMIT) -> None:
        self.layer = case.make_layer().to(case.dtype)
        self.plain = case.make_layer().to(case.dtype)
        config = BackpropClipping(
            bound=case.bound,  # type: ignore[arg-type]
            upstream=case.upstream,  # type: ignore[arg-type]
            max_input_norm=case.max_input_norm,
        )
        self.axis = case.rule.from_module(self.layer).batch_axis(0)
        self.hooks = BackpropClipHooks(
            self.layer,
            config=config,
            max_grad_norm=limit,
            loss_reduction="sum",
            batch_first=self.axis == 0,
        )

    def make(self, inputs: MakeInputs, count: int) -> Inputs:
        """Return the arguments for ``count`` examples, in the layer's dtype."""
        made = inputs(count)
        dtype = next(self.layer.parameters()).dtype
        arguments = made if isinstance(made, tuple) else (made,)
        return _each(arguments, lambda x: x.to(dtype) if x.is_floating_point() else x)

    def hostile(self, inputs: MakeInputs, count: int) -> Inputs:
        """Return the same with every example scaled to a size of its own."""
        return _each(self.make(inputs, count), lambda x: _hostile(x, self.axis))

    def rows(self, arguments: Inputs, rows: Sequence[int]) -> Inputs:
        """Return the arguments for some of the examples."""
        index = torch.tensor(rows, dtype=torch.long)
        return _each(arguments, lambda x: x.index_select(self.axis, index))

    def contribution(self, arguments: Inputs, upstream: Tensor) -> Tensor:
        """Return the clipped sum over the examples, all parameters flattened."""
        y = self.layer(*arguments)
        (y * upstream).sum().backward()
        guard = self.hooks.guard
        sums = [
            torch.zeros_like(p) if (taken := guard.take(p)) is None else taken
            for p in self.layer.parameters()
            if p.requires_grad
        ]
        guard.finish()
        return torch.cat([total.flatten() for total in sums])

    def gradient(self, arguments: Inputs, upstream: Tensor) -> Tensor:
        """Return the same by plain autograd, without clipping."""
        parameters = [p for p in self.plain.parameters() if p.requires_grad]
        loss = (self.plain(*arguments) * upstream).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    def upstream(self, arguments: Inputs) -> Tensor:
        """Return a standard normal upstream gradient for these arguments."""
        with torch.no_grad():
            return torch.randn_like(self.plain(*arguments))

    def example(self, upstream: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the upstream gradient of some of the examples."""
        return upstream.index_select(self.axis, torch.tensor(rows, dtype=torch.long))


def _check_sums(case: _Case, inputs: MakeInputs) -> None:
    for max_input_norm in (3.0, None):
        if max_input_norm is None and case.bound == "product":
            continue
        case = replace(case, max_input_norm=max_input_norm)
        layer = _Layer(case)
        count = 5
        arguments = layer.hostile(inputs, count)
        upstream = _hostile(layer.upstream(layer.make(inputs, count)), layer.axis)
        tolerance = _ROUNDING[case.dtype] * _LIMIT * (count + 1)
        together = layer.contribution(arguments, upstream)
        alone = [
            layer.contribution(layer.rows(arguments, [i]), layer.example(upstream, [i]))
            for i in range(count)
        ]
        for i, own in enumerate(alone):
            _require(bool(own.isfinite().all()), case, "bound", f"example {i}: not finite")
            norm = float(own.norm())
            _require(norm <= _LIMIT + tolerance, case, "bound", f"{norm} > {_LIMIT}")
        apart = float((together - torch.stack(alone).sum(dim=0)).norm())
        _require(
            apart <= tolerance,
            case,
            "independence",
            f"the batch's gradient and the sum of its examples' own differ by {apart}",
        )


def _check_direction(case: _Case, inputs: MakeInputs) -> None:
    if case.bound == "product" or case.dtype != torch.float64:
        return
    layer = _Layer(replace(case, max_input_norm=None))
    arguments = layer.make(inputs, 3)
    upstream = layer.upstream(arguments)
    for i in range(3):
        one, g = layer.rows(arguments, [i]), layer.example(upstream, [i])
        own, clipped = layer.gradient(one, g), layer.contribution(one, g)
        if not own.any():
            continue
        factor = float(own @ clipped / own.square().sum())
        off = float((clipped - factor * own).norm())
        _require(off <= 1e-6 * _LIMIT, case, "direction", f"off the own gradient by {off}")
        _require(factor > 0, case, "direction", f"its factor is {factor}")
        if case.upstream == "clip":
            _require(factor <= 1 + 1e-9, case, "direction", f"its factor is {factor} > 1")


def _check_attained(
    case: _Case, inputs: MakeInputs, worst_case: tuple[Tensor | Inputs, Tensor] | None
) -> None:
    layer = _Layer(case)
    best = 0.0
    for arguments, upstream in _candidates(layer, inputs, worst_case):
        best = max(best, float(layer.contribution(arguments, upstream).norm()))
        if best >= 0.999 * _LIMIT:
            return
    _require(False, case, "attainment", f"{best / _LIMIT:.4f} of the limit reached at most")


def _candidates(
    layer: _Layer, inputs: MakeInputs, worst_case: tuple[Tensor | Inputs, Tensor] | None
) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield examples that may reach the limit: one input entry, and one upstream entry."""
    if worst_case is not None:
        arguments, upstream = worst_case
        yield layer.make(lambda _: arguments, 1), upstream.to(torch.float64)
        return
    template = layer.make(inputs, 1)
    first = template[0]
    assert first is not None
    spikes = [template]
    if first.is_floating_point():
        spikes = []
        for index in range(min(first.numel(), 64)):
            x = torch.zeros_like(first)
            x.view(-1)[index] = 1e4
            spikes.append((x, *template[1:]))
    for arguments in spikes:
        shape = layer.upstream(arguments)
        for index in range(min(shape.numel(), 64)):
            upstream = torch.zeros_like(shape)
            upstream.view(-1)[index] = 1e4
            yield arguments, upstream


def _check_not_finite(case: _Case, inputs: MakeInputs) -> None:
    layer = _Layer(case)
    arguments = layer.make(inputs, 3)
    upstream = layer.upstream(arguments)
    others = layer.contribution(layer.rows(arguments, [0, 1]), layer.example(upstream, [0, 1]))
    for value, where in itertools.product(
        (float("nan"), float("inf"), -float("inf")), range(len(arguments) + 1)
    ):
        *changed, g = spoiled = _each((*arguments, upstream), torch.clone)
        target = spoiled[where]
        if target is None or not target.is_floating_point():
            continue
        row = target.select(layer.axis, 2)
        row[(-1,) * row.dim()] = value
        assert g is not None
        moved = float((layer.contribution(tuple(changed), g) - others).norm())
        # Not `moved > 0`: with nan that is false.
        zero = moved <= 1e-12 * _LIMIT if case.dtype == torch.float64 else moved <= 1e-6 * _LIMIT
        _require(zero, case, "not finite", f"an example with {value} moved the sum by {moved}")


def _check_empty(case: _Case, inputs: MakeInputs) -> None:
    layer = _Layer(case)
    arguments = layer.rows(layer.make(inputs, 1), [])
    try:
        upstream = layer.upstream(arguments)
    except (RuntimeError, ValueError, IndexError):
        return  # the layer itself cannot run on an empty batch
    gradient = layer.contribution(arguments, upstream)
    _require(not bool(gradient.any()), case, "empty batch", "the gradient is not zero")


def _each(arguments: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    return tuple(x if x is None else function(x) for x in arguments)


def _hostile(x: Tensor, axis: int) -> Tensor:
    """Scale every example to a size of its own, one of them to a single entry."""
    if not x.is_floating_point():
        return x
    x = x.clone()
    largest = torch.finfo(x.dtype).max ** 0.4
    for i in range(x.shape[axis]):
        row = x.select(axis, i)
        scale = _SCALES[int(torch.randint(len(_SCALES), ()))]
        if torch.rand(()) < 0.3:
            spike = torch.zeros(row.shape, dtype=row.dtype)
            spike.view(-1)[torch.randint(row.numel(), ())] = 1
            row.copy_(spike)
        row *= min(scale, largest)
    return x


def _require(held: bool, case: _Case, promise: str, detail: str) -> None:
    if not held:
        raise AssertionError(f"{case} breaks its promise: {promise}: {detail}")


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
