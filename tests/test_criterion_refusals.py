"""Uses of a criterion that would go around it, or couple examples, are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import (
    CrossEntropy,
    PrivacyEngine,
    PrivacyViolationError,
)
from tests.criteria import NOT_THROUGH, on_sequences, sequences, training
from tests.helpers import CLASSES, FEATURES, batch, dataset, mlp, snapshot
from tests.test_compile import fresh_compiler  # noqa: F401

REMEDY = (
    "Pass a criterion that returns [B, ...] with reduction='none', one row for each example "
    "(opacus_bpclip.CrossEntropy, or one of torch's), or leave criterion out."
)


def test_flattened_positions_are_refused_and_the_remedies_work():
    t = on_sequences(nn.CrossEntropyLoss())
    x, y = sequences()
    with pytest.raises(ValueError, match="The criterion got 18 losses") as refusal:
        t.criterion(t.model(x).transpose(1, 2).reshape(-1, CLASSES), y.view(-1))
    assert str(refusal.value) == (
        "The criterion got 18 losses for 6 examples. Its rows are not the examples, so the loss "
        "is not a mean of one term for each example. Do not flatten examples and positions "
        "together: pass logits as [B, C, ...] with labels [B, ...], or [B, ..., C] with "
        "opacus_bpclip.CrossEntropy(class_axis=-1)."
    )
    one = t.sum_over(x, y)
    t = on_sequences(CrossEntropy(class_axis=-1))
    other = t.step(lambda: t.criterion(t.model(x).transpose(1, 2), y))
    torch.testing.assert_close(one, other)


def test_fewer_rows_than_examples_are_refused():
    t = training(nn.CrossEntropyLoss())
    x, y = batch()
    with pytest.raises(ValueError, match="The criterion got 5 losses for 6 examples"):
        t.criterion(t.model(x)[:5], y[:5])


@pytest.mark.parametrize(
    "loss",
    [
        lambda t, x, y: F.cross_entropy(t.model(x), y),
        lambda t, x, y: t.criterion(t.model(x), y).detach() + F.cross_entropy(t.model(x), y),
        lambda t, x, y: copy.deepcopy(t.criterion).criterion(t.model(x), y).mean(),
    ],
    ids=["the original", "beside the detached value", "what it holds"],
)
@pytest.mark.parametrize("wrap_model", [True, False])
def test_a_loss_that_goes_around_the_criterion_is_refused(loss, wrap_model):
    t = training(nn.CrossEntropyLoss(), wrap_model=wrap_model)
    x, y = batch()
    before = t.sum_over(x, y)
    t.optimizer.zero_grad()
    with pytest.raises(PrivacyViolationError) as refusal:
        loss(t, x, y).backward()
    assert str(refusal.value) == f"2.bias {NOT_THROUGH}"
    with pytest.raises(PrivacyViolationError, match="did not come through the criterion"):
        t.optimizer.step()
    assert torch.equal(t.sum_over(x, y), before)
    without = training(None)
    without.step(lambda: F.cross_entropy(without.model(x), y))


def test_a_second_backward_pass_around_the_criterion_is_refused():
    t = training(nn.CrossEntropyLoss(), poisson_sampling=False)
    x, y = batch()
    t.criterion(t.model(x), y).backward()
    with pytest.raises(PrivacyViolationError, match="did not come through the criterion"):
        F.cross_entropy(t.model(x), y).backward()


def test_a_sum_may_be_computed_by_anybody():
    t = training(nn.CrossEntropyLoss(reduction="sum"), loss_reduction="sum")
    x, y = batch()
    one = t.sum_over(x, y)
    other = t.step(lambda: F.cross_entropy(t.model(x), y, reduction="sum"))
    torch.testing.assert_close(one, other)


class Composite(nn.Module):
    """A criterion that has a reduction and does not ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"
        self.loss = nn.CrossEntropyLoss()

    def forward(self, outputs: Tensor, labels: Tensor) -> Any:
        return self.loss(outputs, labels)


class Several(Composite):
    def forward(self, outputs: Tensor, labels: Tensor) -> Any:
        return {"loss": self.loss(outputs, labels)}


class Trained(Composite):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (
            F.mse_loss,
            f"Expected criterion={F.mse_loss!r} to have a `reduction`, which is set to 'none' for "
            f"one loss per example. {REMEDY}",
        ),
        (
            nn.CrossEntropyLoss(reduction="sum"),
            f"Expected the criterion's reduction='sum' to be loss_reduction='mean'. {REMEDY}",
        ),
        (
            nn.KLDivLoss(reduction="batchmean"),
            f"Expected the criterion's reduction='batchmean' to be loss_reduction='mean'. {REMEDY}",
        ),
        (
            Trained(),
            "Trained has trainable parameters, whose gradient would not be clipped. Make it a "
            "part of the model, whose forward then returns [B] losses.",
        ),
    ],
)
@pytest.mark.parametrize("target", [None, 3.0])
def test_criterions_that_cannot_be_asked_are_refused_before_training(criterion, message, target):
    model = mlp()
    before = snapshot(model)
    engine = PrivacyEngine()
    call, options = engine.make_private, {"noise_multiplier": 0.0}
    if target is not None:
        call = engine.make_private_with_epsilon
        options = {"target_epsilon": target, "target_delta": 1e-5, "epochs": 1}
    with pytest.raises(ValueError, match=r"reduction|parameters") as refusal:
        call(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=DataLoader(dataset(), batch_size=8),
            max_grad_norm=1.0,
            clipping="backprop",
            criterion=criterion,
            **options,
        )
    assert str(refusal.value) == message
    assert snapshot(model) == before
    training(CrossEntropy(), model).sum_over(*batch())


@pytest.mark.parametrize(
    ("criterion", "what"), [(Composite(), r"shape \(\)"), (Several(), "no tensor")]
)
def test_criterions_that_do_not_answer_are_refused_at_the_first_batch(criterion, what):
    t = training(criterion)
    x, y = batch()
    with pytest.raises(ValueError, match=rf"returned {what} with reduction='none' instead of \[B,"):
        t.criterion(t.model(x), y)


@pytest.mark.parametrize("kind", [nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.PoissonNLLLoss])
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_predictions_that_are_broadcast_against_all_targets_are_refused(kind):
    # 128 times the claim, for MSELoss and 256 examples.
    trained = training(kind(), nn.Sequential(nn.Linear(FEATURES, 1)))
    x, y = batch()
    for output, target in (((6, 1), (6,)), ((6,), (6, 1))):
        with pytest.raises(ValueError, match="broadcast") as refusal:
            trained.criterion(trained.model(x).view(output), y.float().view(target))
        assert str(refusal.value) == (
            f"{kind.__name__} broadcast tensors of the shapes {output}, {target} to losses of "
            "shape (6, 6), so an example's loss depends on other examples' targets. Give them one "
            "shape, for example by target.view_as(output)."
        )
    output = trained.model(x)
    trained.criterion(output, y.float().view_as(output)).backward()
    trained.optimizer.step()


def test_a_criterion_of_another_model_is_refused_by_a_model_without_one():
    one, other = training(nn.CrossEntropyLoss()), training(None)
    x, y = batch()
    one.model(x)
    with pytest.raises(PrivacyViolationError) as refusal:
        one.criterion(other.model(x), y).backward()
    assert "through a criterion that make_private returned for another model" in str(refusal.value)
    other.optimizer.zero_grad()
    nn.CrossEntropyLoss()(other.model(x), y).backward()
    other.optimizer.step()


class Contrastive(nn.Module):
    """Each example against all others."""

    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none")


class Normalised(nn.Module):
    """Losses that are divided by what all of them come to."""

    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(output, target, reduction="none")
        return losses / losses.sum()


class Lagged(nn.Module):
    """Divides by the mean loss of the batch before, in training."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(output, target, reduction="none")
        scale = self.scale
        if torch.is_grad_enabled():
            self.scale = losses.detach().mean()
        return losses / scale


@pytest.mark.parametrize("criterion", [Contrastive(), Normalised(), Lagged()])
def test_a_criterion_that_couples_examples_is_refused(criterion):
    # 29 times the claim, for a contrastive one and 50 examples.
    trained = training(criterion)
    x, y = batch()
    trained.criterion(trained.model(x[:1]), y[:1])  # with a single row, coupling cannot be seen
    with pytest.raises(ValueError, match="couples examples") as refusal:
        trained.criterion(trained.model(x), y)
    assert str(refusal.value) == (
        f"{type(criterion).__name__} couples examples: an example's loss changes when others are "
        "left out of the batch, so one example changes the gradients of others. Compute each "
        "example's loss from that example alone, without means, softmax or neighbours over the "
        "batch."
    )
