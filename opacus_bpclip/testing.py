"""`check_rule`: everything that a rule must keep, tried on a layer of yours.

For authors of rules, in a test of their own; every rule of the package goes through it as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from opacus_bpclip.config import BackpropClipping, Bound, Upstream
from opacus_bpclip.grad_sample_module import BackpropClipHooks
from opacus_bpclip.rules import RULES, Rule

# What cancellation in a sum of contributions may add, relative to the sensitivity.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}
_SCALES = (1e-30, 1e-3, 1.0, 1e3, 1e30)
# Of an example's input and upstream gradient: noise, one entry, entries that agree, nothing.
_KINDS = ("normal", "normal", "spike", "constant", "zero")
_LIMIT = 0.7
_SPIKES = 50

T = TypeVar("T")

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
    frozen: str = ""

    def with_one_frozen(self) -> Iterator[_Case]:
        """Yield the same with one of the layer's parameters frozen, if it has several."""
        names = [name for name, p in self.make_layer().named_parameters() if p.requires_grad]
        for name in names if len(names) > 1 else ():

            def frozen(name: str = name) -> nn.Module:
                layer = self.make_layer()
                layer.get_parameter(name).requires_grad_(False)
                return layer

            yield replace(self, make_layer=frozen, frozen=f", {name} frozen")

    def __str__(self) -> str:
        return (
            f"{self.rule.__name__} with bound={self.bound!r}, upstream={self.upstream!r}, "
            f"max_input_norm={self.max_input_norm}, {self.dtype}{self.frozen}"
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
    - *independence*: a batch's gradient is the sum of what its examples contribute alone, and what
      the layer sends up and down for an example is what it sends for the example alone;
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
            if dtype == torch.float64 and upstream == "clip":
                _check_spikes(case, inputs)
                for part in case.with_one_frozen():
                    _check_sums(part, inputs)


class _Run(NamedTuple):
    """What comes out of a layer: its clipped sum, and all that other layers see of it."""

    contribution: Tensor
    sent: Inputs  # the output, and the gradients of the inputs


class _Layer:
    """A layer with clipping attached, and its gradients on demand."""

    def __init__(self, case: _Case, limit: float = _LIMIT) -> None:
        self.layer = case.make_layer().to(case.dtype)
        self.plain = case.make_layer().to(case.dtype)
        config = BackpropClipping(
            bound=case.bound,  # type: ignore[arg-type]
            upstream=case.upstream,  # type: ignore[arg-type]
            max_input_norm=case.max_input_norm,
            probe=False,  # what it would find is judged here, on the values that are searched
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

    def rows(self, arguments: Inputs, rows: Sequence[int]) -> Inputs:
        """Return the arguments for some of the examples."""
        index = torch.tensor(rows, dtype=torch.long)
        return _each(arguments, lambda x: x.index_select(self.axis, index))

    def contribution(self, arguments: Inputs, upstream: Tensor) -> Tensor:
        """Return the clipped sum over the examples, all parameters flattened."""
        return self.run(arguments, upstream).contribution

    def run(self, arguments: Inputs, upstream: Tensor) -> _Run:
        """Run the layer forward and backward."""
        arguments = _each(arguments, lambda x: x.detach().requires_grad_(x.is_floating_point()))
        y = self.layer(*arguments)
        (y * upstream).sum().backward()
        guard = self.hooks.guard
        sums = [
            torch.zeros_like(p) if (taken := guard.take(p)) is None else taken
            for p in self.layer.parameters()
            if p.requires_grad
        ]
        guard.finish()
        sent = (y.detach(), *(None if x is None else x.grad for x in arguments))
        return _Run(torch.cat([total.flatten() for total in sums]), sent)

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
        arguments, upstream = _hostile(layer, inputs, count)
        tolerance = _ROUNDING[case.dtype] * _LIMIT * (count + 1)
        together = layer.run(arguments, upstream)
        # Each by a fresh layer: a rule must not remember what it has seen.
        runs = [
            _Layer(case).run(layer.rows(arguments, [i]), layer.example(upstream, [i]))
            for i in range(count)
        ]
        alone = [run.contribution for run in runs]
        for i, own in enumerate(alone):
            _require(bool(own.isfinite().all()), case, "bound", f"example {i}: not finite")
            norm = float(own.norm())
            _require(norm <= _LIMIT + tolerance, case, "bound", f"{norm} > {_LIMIT}")
        apart = float((together.contribution - torch.stack(alone).sum(dim=0)).norm())
        _require(
            apart <= tolerance,
            case,
            "independence",
            f"the batch's gradient and the sum of its examples' own differ by {apart}",
        )
        for i, run in enumerate(runs):
            _require(
                all(map(_agree, layer.rows(together.sent, [i]), run.sent)),
                case,
                "independence",
                f"what the layer sends for example {i} depends on the others",
            )


def _agree(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two rows are the same up to rounding; a mix of examples is far off."""
    if one is None or other is None:
        return one is other
    size = float(other.nan_to_num(posinf=0, neginf=0).abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def _check_spikes(case: _Case, inputs: MakeInputs) -> None:
    """One entry of the input, and one of the upstream gradient: the worst cases of most layers."""
    layer = _Layer(case)
    (x, *others), upstream = layer.make(inputs, 1), layer.upstream(layer.make(inputs, 1))
    assert x is not None
    for _ in range(_SPIKES):
        one = _shaped(x, "spike") * 1e4 if x.is_floating_point() else x
        own = layer.contribution((one, *others), _shaped(upstream, "spike") * 1e4)
        norm = float(own.norm())
        _require(norm <= _LIMIT * (1 + 1e-9), case, "bound", f"{norm} > {_LIMIT}")


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
    values = (float("nan"), float("inf"), -float("inf"))
    for value, where, _ in itertools.product(values, range(len(arguments) + 1), range(2)):
        *changed, g = spoiled = _each((*arguments, upstream), torch.clone)
        target = spoiled[where]
        if target is None or not target.is_floating_point():
            continue
        row = target.select(layer.axis, 2)
        place = int(torch.randint(row.numel(), ()))
        row[tuple(int(k) for k in torch.unravel_index(torch.tensor(place), row.shape))] = value
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


def _hostile(layer: _Layer, inputs: MakeInputs, count: int) -> tuple[Inputs, Tensor]:
    """Return arguments and upstream gradient, each example of a kind and a size of its own."""
    arguments = layer.make(inputs, count)
    upstream = layer.upstream(arguments)
    kinds = [(_drawn(_KINDS), _drawn(_KINDS)) for _ in range(count)]
    # Half of them of one kind in both, for what shows only where both agree.
    kinds = [(x, x if torch.rand(()) < 0.5 else g) for x, g in kinds]
    spoil = partial(_spoilt, axis=layer.axis)
    arguments = _each(arguments, lambda x: spoil(x, kinds=[kind for kind, _ in kinds]))
    return arguments, spoil(upstream, kinds=[kind for _, kind in kinds])


def _spoilt(x: Tensor, kinds: Sequence[str], axis: int) -> Tensor:
    if not x.is_floating_point():
        return x
    x = x.clone()
    largest = torch.finfo(x.dtype).max ** 0.4
    for i, kind in enumerate(kinds):
        row = x.select(axis, i)
        row.copy_(_shaped(row, kind) * min(_drawn(_SCALES), largest))
    return x


def _shaped(x: Tensor, kind: str) -> Tensor:
    """Return one example's numbers, made over to be of a kind."""
    if kind == "normal":
        return x
    if kind == "spike":
        spike = torch.zeros(x.shape, dtype=x.dtype)
        spike.view(-1)[torch.randint(x.numel(), ())] = 1
        return spike
    return torch.full(x.shape, float(kind == "constant"), dtype=x.dtype)


def _drawn(values: Sequence[T]) -> T:
    return values[int(torch.randint(len(values), ()))]


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
