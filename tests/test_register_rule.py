"""Rules for layers that the package does not know."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip import BackpropClipping, CoverageError, register_rule
from opacus_bpclip.model.coverage import examine
from opacus_bpclip.rules import (
    RULES,
    FunctionRule,
    Inputs,
    LinearRule,
    Prepared,
    Rule,
    bound_of,
    registered_kind,
)
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence, check_sensitivity, joint
from tests.followed import check_followed
from tests.helpers import FEATURES
from tests.strategies import BOUNDS


class Shift(nn.Module):
    """Adds a raw parameter to every example, as a position embedding does."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@dataclass(frozen=True)
class ShiftRule(Rule):
    """The example's gradient is its upstream gradient: the exact norm costs nothing."""

    parameters = ("shift",)

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        return cls(weight=True, bias=False)

    def expected_dims(self) -> tuple[int, int | None]:
        return 2, None

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        return Prepared(inputs, None, inputs[0].detach().flatten(1).isfinite().all(dim=1))

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        return g.flatten(1).norm(dim=1)


@pytest.fixture
def registered() -> Iterator[None]:
    register_rule(Shift)(ShiftRule)
    yield
    del RULES[Shift]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_raw_parameter_of_ones_own_layer_trains_within_the_bound(bound):
    model = nn.Sequential(nn.Linear(3, 4), Shift(4), nn.Tanh(), nn.Linear(4, 2))
    trainer = Trainer(model, (3,), layerwise(bound=bound))
    x = torch.randn(5, 3, dtype=torch.float64) * 10
    target = torch.randn(5, 2, dtype=torch.float64) * 1e3
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)


@pytest.mark.usefixtures("registered")
def test_a_registered_rule_attains_its_limit():
    trainer = Trainer(Shift(3), (3,), layerwise(), max_grad_norm=0.7)
    target = torch.full((1, 3), 1e4, dtype=torch.float64)
    reached = joint(trainer.released(torch.ones(1, 3, dtype=torch.float64), target)).norm()
    assert 0.999 * 0.7 <= reached <= 0.7


class WeightedShiftRule(ShiftRule):
    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        return 2 * self.exact(g, inputs, input_norms)

    def size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        return 3 * self.exact(g, (), input_norms)


@pytest.mark.parametrize(
    ("rule", "times"),
    [
        (ShiftRule, {"product": 1, "weighted": 1}),
        (WeightedShiftRule, {"product": 2, "weighted": 2}),
    ],
    ids=["exact alone", "exact and weighted"],
)
def test_a_bound_left_out_is_the_next_tighter_one_and_as_large_in_size(rule, times):
    own, g = rule(weight=True, bias=False), torch.ones(2, 4)
    for name, factor in {**times, "exact": 1}.items():
        bound = bound_of(name)
        assert bound.of(own, g, (), None, 3.0).tolist() == [2 * factor] * 2
        torch.testing.assert_close(bound.size(own, g, None), own.size(g, None))


def test_without_a_rule_the_functions_that_the_layer_calls_are_followed():
    (found,) = examine(Shift(FEATURES))
    assert isinstance(found.rule, FunctionRule)
    check_followed(lambda: Shift(FEATURES))


def test_a_rule_is_not_replaced_silently():
    with pytest.raises(ValueError, match=r"Linear has a rule already, LinearRule\. Pass replace"):
        register_rule(nn.Linear)(ShiftRule)
    assert RULES[nn.Linear] is LinearRule


def test_a_rule_is_replaced_on_demand():
    class Narrower(LinearRule):
        pass

    try:
        assert register_rule(nn.Linear, replace=True)(Narrower) is Narrower
        assert RULES[nn.Linear] is Narrower
    finally:
        RULES[nn.Linear] = LinearRule


@pytest.mark.usefixtures("registered")
def test_several_kinds_are_registered_together_or_not_at_all():
    class New(nn.Module):
        pass

    with pytest.raises(ValueError, match="Shift has a rule already"):
        register_rule(New, Shift)(ShiftRule)
    assert New not in RULES


SHIFT = f"{Shift.__module__}.{Shift.__qualname__}"


@pytest.mark.parametrize("budget", [BackpropClipping(), layerwise()], ids=["joint", "layerwise"])
def test_a_class_may_be_named_by_its_dotted_path(budget):
    register_rule(SHIFT)(ShiftRule)
    try:
        assert registered_kind(Shift) == (Shift, ShiftRule)
        trainer = Trainer(nn.Sequential(nn.Linear(3, 4), Shift(4)), (3,), budget)
        target = torch.randn(5, 4, dtype=torch.float64) * 1e3
        check_sensitivity(trainer, torch.randn(5, 3, dtype=torch.float64), target)
    finally:
        del RULES[SHIFT]


@pytest.mark.parametrize(("first", "second"), [(Shift, SHIFT), (SHIFT, Shift), (SHIFT, SHIFT)])
def test_a_class_and_its_path_are_one_kind(first, second):
    class Other(ShiftRule):
        pass

    register_rule(first)(ShiftRule)
    try:
        with pytest.raises(ValueError, match=rf"^{SHIFT} has a rule already, ShiftRule\. Pass"):
            register_rule(second)(Other)
        assert registered_kind(Shift) == (Shift, ShiftRule)
        register_rule(second, replace=True)(Other)
        assert registered_kind(Shift) == (Shift, Other)
        assert {Shift, SHIFT} & set(RULES) == {second}
    finally:
        RULES.pop(second, None)
        RULES.pop(first, None)


def test_a_class_of_the_same_name_is_another_kind():
    """As where the cell of a notebook is run again."""
    kinds = [type("Again", (Shift,), {}) for _ in range(2)]
    try:
        for kind in kinds:
            register_rule(kind)(ShiftRule)
    finally:
        for kind in kinds:
            RULES.pop(kind, None)


def test_a_fresh_import_has_every_rule_and_no_package_that_need_not_be_installed():
    code = (
        "import sys, opacus_bpclip, opacus_bpclip.rules.registry as registry; "
        "print(*(rule.__name__ for rule in registry.RULES.values())); "
        "assert not {'flwr', 'lightning', 'torchvision', 'transformers'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"LinearRule", "LayerScaleRule", "TransposedLinearRule"} <= set(out.stdout.split())


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        (Shift, object, "to be a subclass of Rule"),
        (Shift, lambda: None, "to be a subclass of Rule"),
        (int, ShiftRule, "to be a subclass of nn.Module"),
        ("Linear", ShiftRule, "to be a subclass of nn.Module, or the dotted path of one"),
        ("package.<locals>.Linear", ShiftRule, "to be a subclass of nn.Module, or the dotted path"),
        (".Linear", ShiftRule, "to be a subclass of nn.Module, or the dotted path"),
    ],
    ids=["no rule", "function", "no module", "a name", "a local class", "no package"],
)
def test_only_rules_for_module_classes_are_registered(kind, rule, message):
    before = dict(RULES)
    with pytest.raises(TypeError, match=message):
        register_rule(kind)(rule)
    assert before == RULES


class Around(Shift):
    """Has a parameter of its own, and a layer that it would cut off."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(x))


class Apart(nn.Module):
    """The same, the parameter in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.inner = Shift(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shift(self.inner(x))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("budget", [BackpropClipping(), layerwise()], ids=["joint", "layerwise"])
def test_a_layer_around_another_one_is_refused_and_the_remedy_trains(budget, monkeypatch):
    monkeypatch.setitem(RULES, Around, ShiftRule)
    with pytest.raises(CoverageError) as refusal:
        Trainer(nn.Sequential(Around(3)), (3,), budget)
    assert str(refusal.value) == (
        "0 (Around) has a rule for parameters of its own and contains 0.inner, which would get no "
        "gradient from the loss. Put its own parameters into a separate module, or write a "
        "BroadcastRule for them."
    )
    trainer = Trainer(Apart(), (3,), budget)
    x = torch.randn(4, 3).double()
    check_sensitivity(trainer, x, 100 * torch.randn(4, 3).double())
    assert all(part.any() for part in trainer.released(x, torch.ones(4, 3).double()).values())
