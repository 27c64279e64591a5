"""Parameters that a module broadcasts over the batch: class tokens, position embeddings, scales."""

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_bpclip import CoverageError, PrivacyViolationError, register_rule
from opacus_bpclip.rules import RULES, BroadcastRule
from tests.budgets import layerwise
from tests.checks import (
    Trainer,
    check_independence,
    check_sensitivity,
    check_silent,
    joint,
    squared_loss,
)
from tests.strategies import BOUNDS, MODES, hostile_batches, hostile_examples, scales, seeds

TOKENS, WIDTH = 3, 4


class Prompted(nn.Module):
    """Every use of raw parameters at once: put beside, added, multiplied, and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = self.scale * torch.tanh(self.inner(x))
        return x + torch.sigmoid(self.scale)


class PromptedRule(BroadcastRule):
    parameters = ("token", "positions", "scale")
    dims: ClassVar = {"scale": 3}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register_rule(Prompted)(PromptedRule)
    yield
    del RULES[Prompted]


def _model() -> nn.Module:
    return nn.Sequential(Prompted(), nn.Flatten(), nn.Linear((TOKENS + 1) * WIDTH, 2))


@st.composite
def neighbours(draw, dtype=torch.float64):
    torch.manual_seed(draw(seeds))
    bound, normalize = draw(st.sampled_from(MODES))
    trainer = Trainer(
        _model(),
        (TOKENS, WIDTH),
        layerwise(bound=bound, normalize=normalize),
        max_grad_norm=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        reduction=draw(st.sampled_from(["mean", "sum"])),
        dtype=dtype,
    )
    companions = draw(hostile_batches((TOKENS, WIDTH), dtype))
    x = torch.cat([companions, draw(hostile_examples((TOKENS, WIDTH), dtype))[None]])
    rows = torch.tensor([draw(scales) for _ in range(len(x))], dtype=dtype)
    return trainer, x, torch.randn(len(x), 2, dtype=dtype) * rows[:, None]


@given(neighbours())
def test_one_example_moves_raw_parameters_by_at_most_their_sensitivity(case):
    check_sensitivity(*case)
    check_independence(*case)


@given(neighbours(dtype=torch.float32))
def test_the_bound_holds_in_float32(case):
    check_sensitivity(*case)


@given(seeds, st.sampled_from([1e-2, 1.0, 1e2]))
def test_the_sum_is_each_examples_own_gradient_clipped_to_the_limit(seed, limit):
    torch.manual_seed(seed)
    model = Prompted().double()
    model.inner.requires_grad_(False)
    x = torch.randn(3, TOKENS, WIDTH).double()
    target = torch.randn(3, (TOKENS + 1) * WIDTH).double()
    raw = [model.token, model.positions, model.scale]
    expected = 0
    for i in range(3):
        loss = squared_loss(model(x[i : i + 1]), target[i : i + 1], "sum")
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, raw)])
        expected = expected + gradient * min(1, limit / float(gradient.norm()))
    trainer = Trainer(model, (TOKENS, WIDTH), layerwise(), max_grad_norm=limit, loss=squared_loss)
    assert torch.allclose(joint(trainer.released(x, target)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("bound", "normalize"), MODES)
def test_one_example_reaches_the_limit(bound, normalize):
    model = Prompted()
    model.inner.requires_grad_(False)
    clipping = layerwise(bound=bound, normalize=normalize)
    trainer = Trainer(model, (TOKENS, WIDTH), clipping, max_grad_norm=0.7)
    target = torch.full((1, (TOKENS + 1) * WIDTH), 1e4, dtype=torch.float64)
    reached = joint(trainer.released(torch.ones(1, TOKENS, WIDTH).double(), target)).norm()
    assert 0.999 * 0.7 <= reached <= 0.7


@pytest.mark.parametrize("bound", BOUNDS)
def test_an_example_that_is_not_finite_contributes_nothing(bound):
    trainer = Trainer(_model(), (TOKENS, WIDTH), layerwise(bound=bound))
    x, target = torch.randn(4, TOKENS, WIDTH).double(), torch.randn(4, 2).double()
    x[-1, 1, 2] = float("inf")
    check_silent(trainer, x, target)


def test_the_parameters_are_back_in_their_place_after_a_forward_pass():
    model = _model()
    before = dict(model.named_parameters())
    trainer = Trainer(model, (TOKENS, WIDTH), layerwise())
    x = torch.randn(2, TOKENS, WIDTH).double()
    trainer.model(x)
    assert dict(model.named_parameters()) == before
    with pytest.raises(RuntimeError, match="must match"):
        trainer.model(x[:, :-1])
    assert dict(model.named_parameters()) == before
    with torch.no_grad():
        trainer.model(x)
    assert dict(model.named_parameters()) == before


def test_checkpointing_is_no_second_use():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Prompted()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    trainer = Trainer(Wrapped(), (TOKENS, WIDTH), layerwise())
    x = torch.randn(3, TOKENS, WIDTH).double()
    target = torch.randn(3, (TOKENS + 1) * WIDTH).double() * 100
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)


def test_a_use_outside_the_modules_forward_is_refused():
    model = _model()
    trainer = Trainer(model, (TOKENS, WIDTH), layerwise())
    loss = trainer.model(torch.randn(3, TOKENS, WIDTH).double()).sum() + model[0].scale.sum()
    with pytest.raises(PrivacyViolationError, match=r"0\.scale got gradient from outside"):
        loss.backward()


def test_a_parameter_put_in_later_is_refused():
    model = _model()
    trainer = Trainer(model, (TOKENS, WIDTH), layerwise())
    model[0].scale = nn.Parameter(torch.ones(WIDTH).double())
    with pytest.raises(PrivacyViolationError):
        trainer.model(torch.randn(3, TOKENS, WIDTH).double())


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({}, r"scale, of shape \(4,\), has no first axis of size 1 for the batch\. Set ScaleRule"),
        (
            {"scale": 1},
            r"scale, of shape \(4,\), leaves no axis .* of 1 axes\. Set ScaleRule\.dims",
        ),
    ],
    ids=["no axis", "too few"],
)
def test_a_parameter_that_could_be_taken_for_a_batch_is_refused(dims, message):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    rule = type("ScaleRule", (BroadcastRule,), {"parameters": ("scale",), "dims": dims})
    register_rule(Scale)(rule)
    try:
        with pytest.raises(CoverageError, match=message):
            Trainer(Scale(), (WIDTH,), layerwise())
    finally:
        del RULES[Scale]


class Scaled(nn.Module):
    """One class that is used on tensors of three and of four axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class ScaledRule(BroadcastRule):
    parameters = ("scale",)
    dims: ClassVar = {"scale": 3}


class Bent(Scaled):
    """Bends its copies before they meet the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.scale.square())


class BentRule(ScaledRule):
    pass


class Nested(nn.Module):
    """Meets the output of a child, and something constant."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.child = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("constant", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * (self.scale * self.constant)


class NestedRule(ScaledRule):
    pass


AXES = (
    "0.scale is broadcast against a tensor of {axes} axes, of shape {shape}, but its rule expects "
    "3 axes, the batch included. One example's copy of the parameter would be combined with other "
    "examples. Set the rule's dims to the number of axes of that tensor. A module that is used on "
    "tensors of different numbers of axes needs a class and a rule for each."
)


@pytest.mark.parametrize(
    ("kind", "rule"), [(Scaled, ScaledRule), (Bent, BentRule), (Nested, NestedRule)]
)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("shape", [(1, 3, WIDTH), (4, 3, WIDTH), (WIDTH,)])
def test_a_rule_with_wrong_dims_is_refused_on_every_batch(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[nn.Module],
    rule: type[BroadcastRule],
    count: int,
    shape: tuple[int, ...],
) -> None:
    monkeypatch.setitem(RULES, kind, rule)
    trainer = Trainer(nn.Sequential(kind()), (2, WIDTH), layerwise())
    right = torch.randn(count, 2, WIDTH, dtype=torch.float64)
    trainer.model(right).sum().backward()
    trainer.optimizer.zero_grad()
    wrong = torch.randn(count, *shape, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(PrivacyViolationError) as refusal:
            trainer.model(wrong)
        assert str(refusal.value) == AXES.format(axes=wrong.dim(), shape=tuple(wrong.shape))
        trainer.optimizer.zero_grad()
    trainer.model(right).sum().backward()
    trainer.optimizer.step()
