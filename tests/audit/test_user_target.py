"""Models of users' own, and code that is not this package's."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opacus_bpclip import CoverageError
from opacus_bpclip.audit import audit, model_target
from opacus_bpclip.audit.engine_target import EngineTrainer
from opacus_bpclip.errors import PrivacyViolationError


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def with_dropout():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3), nn.Dropout(0.2))


def embedding():
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize(
    ("make_model", "inputs", "least"),
    [
        (network, lambda n: torch.randn(n, 6), 0.9),
        (embedding, lambda n: torch.randint(5, (n, 3)), 0.0),
    ],
)
def test_the_worst_loss_is_the_default_and_comes_near_the_sensitivity(make_model, inputs, least):
    verdict = audit(model_target("mine", make_model, inputs), trials=0)
    assert verdict.outcome == "pass"
    assert verdict.neighbours.change > least


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_ones_own(reduction):
    target = model_target(
        "mine",
        network,
        lambda n: (torch.randn(n, 6), torch.randint(3, (n,))),
        loss=partial(F.cross_entropy, reduction=reduction),
        loss_reduction=reduction,
        max_grad_norm=0.1,
    )
    verdict = audit(target, trials=0, searches=20)
    assert verdict.outcome == "pass"
    assert 0.05 < verdict.neighbours.change <= 0.1


@pytest.mark.parametrize("make_model", [network, with_dropout])
def test_a_loss_that_couples_examples_is_a_violation(make_model):
    def loss(output, y):
        # A mean over what is private: how many examples are of class 0.
        weights = torch.tensor([1.0, 100.0, 100.0])[y]
        each = F.cross_entropy(output, y, reduction="none")
        return (each * weights).sum() / weights.sum().clamp(min=1)

    def batch(n):
        return torch.randn(n, 6), torch.arange(n) % 3

    target = model_target("coupled", make_model, batch, loss=loss, max_grad_norm=0.5)
    assert audit(target, trials=0).outcome == "violation"


def test_dropout_is_no_fault_of_a_model():
    target = model_target("mine", with_dropout, lambda n: torch.randn(n, 6))
    verdict = audit(target, trials=100, searches=20)
    assert verdict.outcome == "pass"
    assert verdict.neighbours.ratio > 0.99


def test_a_model_that_cannot_be_bounded_is_refused():
    target = model_target("bn", lambda: nn.BatchNorm1d(6), lambda n: torch.randn(n, 6))
    with pytest.raises((CoverageError, ValueError)):
        target.make(1.0)


def test_layers_that_cannot_run_on_an_empty_batch_step_without_a_backward_pass():
    trainer = EngineTrainer(lambda: nn.InstanceNorm1d(2, affine=True), None, 0.0)
    empty, full = torch.zeros(0, 2, 3), torch.randn(2, 2, 3)
    for _ in range(2):  # found out, and remembered
        assert not trainer.on((empty, empty)).any()
    assert trainer.on((full, full)).any()
    assert trainer.history()[0][2] == 3


def test_errors_on_batches_that_are_not_empty_are_the_users_to_see():
    trainer = EngineTrainer(lambda: nn.Linear(2, 1), None, 0.0, loss_reduction="sum")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.on((torch.zeros(1, 3), torch.zeros(1, 1)))


def test_a_refusal_on_an_empty_batch_is_not_taken_for_a_layers_weakness():
    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            with torch.autocast("cpu", torch.float16):
                return self.layer(x)

    trainer = EngineTrainer(Autocast, None, 0.0, loss_reduction="sum")
    with pytest.raises(PrivacyViolationError, match=r"layer computes in torch\.float16"):
        trainer.on((torch.zeros(0, 2), torch.zeros(0, 2)))
