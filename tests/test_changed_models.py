"""A model that is changed after make_private stays bounded, or is refused on the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.rules import RULES, LinearRule
from tests.helpers import (
    CLASSES,
    FEATURES,
    Switchable,
    assert_refused_until_zero_grad,
    backward,
    batch,
    make_private,
    model_of,
    summed,
    switchable,
    train_step,
    tricked,
)


@pytest.mark.parametrize(
    ("dtype", "problem"),
    [
        (torch.bfloat16, "body computes in torch.bfloat16, and the loss is a mean"),
        (torch.float16, "body computes in torch.float16, whose largest number is so small"),
    ],
    ids=str,
)
def test_lower_precision_after_make_private_is_refused(dtype: torch.dtype, problem: str) -> None:
    private = switchable()
    private.model.to(dtype)
    with pytest.raises(PrivacyViolationError, match=problem):
        private.model(batch()[0].to(dtype)).sum().backward()
    private.model.float()
    assert_refused_until_zero_grad(private)


def test_higher_precision_after_make_private_is_fine() -> None:
    private = switchable()
    private.model.double()
    private.model(batch()[0].double()).sum().backward()
    private.optimizer.step()
    assert {p.summed_grad.dtype for p in private.parameters} == {torch.float64}
    assert summed(private).norm() <= 6


def test_a_batch_normalization_that_is_put_in_later_is_refused() -> None:
    class Replaceable(Switchable):
        def __init__(self) -> None:
            super().__init__()
            self.norm: nn.Module = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.body(x)))

    model = Replaceable()
    private = make_private(model)
    train_step(private)
    private.optimizer.zero_grad()
    model.norm = nn.BatchNorm1d(8, affine=False)
    with pytest.raises(PrivacyViolationError, match=r"^norm normalises over the batch"):
        backward(private)
    model.norm = nn.Identity()
    assert_refused_until_zero_grad(private)


def test_activations_that_are_changed_while_they_are_saved_are_refused() -> None:
    # Rounded up, or scaled by 100 as here, they are not those that the bound was computed from.
    private = switchable()
    scaled = torch.autograd.graph.saved_tensors_hooks(lambda x: x * 100, lambda x: x)
    with scaled, pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == (
        "body runs under hooks on saved tensors (saved_tensors_hooks) that are not torch's own: if "
        "they change a value, as lossy compression of activations does, the layer's gradient is "
        "not the one that is bounded. Use save_on_cpu or checkpoint(..., use_reentrant=False)."
    )
    assert_refused_until_zero_grad(private)


def test_activations_may_wait_on_the_cpu() -> None:
    plain, private = switchable(), switchable()
    train_step(plain)
    with torch.autograd.graph.save_on_cpu():
        train_step(private)
    assert torch.equal(summed(private), summed(plain))


def test_a_forward_pass_that_failed_is_over() -> None:
    private = switchable()
    with pytest.raises(ZeroDivisionError):
        tricked(lambda m, x: (m.body(x), 1 / 0))(private)
    with pytest.raises(PrivacyViolationError, match=r"^head was called outside its model's"):
        model_of(private).head(torch.ones(6, 8))
    assert_refused_until_zero_grad(private)


class Borrowing(nn.Linear):
    """Uses the weight of a layer that it does not own, as hand-made weight tying does."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__(FEATURES, CLASSES)
        self.lender = [lender]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(100 * x, self.lender[0].weight)


class Lending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lender = nn.Linear(FEATURES, CLASSES)
        self.layer = Borrowing(self.lender)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_parameter_that_another_layers_rule_knows_nothing_of_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RULES, Borrowing, LinearRule)
    private = make_private(Lending())
    with pytest.raises(PrivacyViolationError) as refusal:
        (1e3 * private.model(batch(1)[0])).sum().backward()
    assert str(refusal.value) == (
        "layer uses a parameter of shape (3, 4) that is not its own: the layer's rule bounds only "
        "its own parameters, so the gradient of this one would be lost. Use each parameter "
        "through its own layer."
    )
