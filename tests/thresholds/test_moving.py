"""How thresholds move, and what they outlive: physical batches, checkpoints, copies, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import (
    BackpropClipHooks,
    BackpropClipping,
    PrivacyEngine,
    PrivacyViolationError,
    ThresholdSchedule,
)
from opacus_bpclip.clipping.factors import COUNT_WIDTH
from tests.budgets import layerwise
from tests.checks import Trainer
from tests.helpers import batch, dataset, hand_over, make_private, mlp
from tests.thresholds.helpers import QUANTILE, RATE, adaptive, adaptive_model, loss_of, train_step


def moved(within: float, *, quantile: float = QUANTILE) -> float:
    """Return what a threshold of 1 becomes."""
    return math.exp(-RATE * (within - quantile))


def pair(norms: list[float], **options: Any) -> tuple[Trainer, Tensor, Tensor]:
    """A linear layer, and examples whose gradients have the given norms."""
    clipping = BackpropClipping(threshold=adaptive(**options))
    trainer = Trainer(nn.Sequential(nn.Linear(1, 1, bias=False)), (1,), clipping)
    return trainer, torch.ones(len(norms), 1).double(), torch.tensor(norms).double()[:, None]


@pytest.mark.parametrize(
    ("norms", "within"),
    [
        ([0.1, 0.2, 5.0, 9.0], 2.0),
        ([0.1, 0.2, 0.3, 0.4], 4.0),
        ([5.0, 1e3, 7.0, 9.0], 0.0),
        # On the threshold, and half way to where the count ends.
        ([1.0, 1.0 + COUNT_WIDTH / 2, 1.0 - COUNT_WIDTH / 2, 2.0], 1.5),
        # What is not finite counts one half, as an example that is not there.
        ([0.1, 0.1, 0.1, float("nan")], 3.5),
        ([0.1], 2.5),  # a Poisson batch of one, where four are expected
        ([], 2.0),
    ],
)
def test_a_threshold_follows_the_fraction_of_examples_within_it(
    norms: list[float], within: float
) -> None:
    trainer, x, target = pair(norms)
    trainer.step(x, target)
    assert trainer.optimizer.thresholds == pytest.approx({"(model)": moved(within / 4)})


def test_a_step_uses_the_threshold_that_it_began_with() -> None:
    trainer, x, target = pair([0.1, 0.2, 0.3, 50.0])
    trainer.step(x, target)
    first = trainer.plain[0].weight.summed_grad.clone()
    assert float(first) == pytest.approx(0.1 + 0.2 + 0.3 + 1.0)
    threshold = trainer.optimizer.thresholds["(model)"]
    trainer.step(x, target)
    assert float(trainer.plain[0].weight.summed_grad) == pytest.approx(0.6 / threshold + 1.0)


def test_the_quantile_rises_over_the_first_steps() -> None:
    trainer, x, target = pair([0.1, 0.2, 5.0, 9.0], ramp_steps=2)
    found = [1.0]
    for _ in range(3):
        trainer.step(x, target)
        found.append(trainer.optimizer.thresholds["(model)"])
    steps = [after / before for before, after in itertools.pairwise(found)]
    assert steps == pytest.approx([moved(0.5, quantile=q) for q in (0.0, QUANTILE / 2, QUANTILE)])


@pytest.mark.parametrize(("norms", "end"), [([0.0] * 4, 0.9), ([9.0] * 4, 1.1)])
def test_a_threshold_stays_between_its_ends(norms: list[float], end: float) -> None:
    trainer, x, target = pair(norms, min_clipbound=0.9, max_clipbound=1.1)
    for _ in range(3):
        trainer.step(x, target)
    assert trainer.optimizer.thresholds == {"(model)": end}


def test_a_schedule_moves_whatever_the_data_are() -> None:
    clipping = layerwise(allocation="equal", threshold=ThresholdSchedule(0.4, 0.1, 2))
    private = make_private(mlp(), backprop=clipping)
    found = [list(private.optimizer.thresholds.values())]
    for size in (6, 0, 3):
        train_step(private, size)
        found.append(list(private.optimizer.thresholds.values()))
    assert found == [pytest.approx([t, t]) for t in (0.4, 0.2, 0.1, 0.1)]
    assert not private.optimizer._hooks._sensitivities.counts


def test_physical_batches_are_counted_together() -> None:
    whole, parts = adaptive_model(counted=True), adaptive_model(counted=True)
    for private, size in ((whole, 1000), (parts, 3)):
        torch.manual_seed(5)
        with BatchMemoryManager(
            data_loader=private.loader, max_physical_batch_size=size, optimizer=private.optimizer
        ) as loader:
            for x, y in loader:
                private.optimizer.zero_grad()
                loss_of(private.model, x, y).backward()
                private.optimizer.step()
    assert whole.steps == parts.steps == 4
    assert whole.optimizer.thresholds != {"(model)": 0.5}
    assert whole.optimizer.thresholds == pytest.approx(parts.optimizer.thresholds, rel=1e-5)


def test_padding_is_not_counted() -> None:
    plain, padded = (
        adaptive_model(counted=True),
        adaptive_model(counted=True, physical_batch_size=5),
    )
    for private in (plain, padded):
        torch.manual_seed(5)
        for x, y in private.loader:
            private.optimizer.zero_grad()
            loss_of(private.model, x, y).backward()
            private.optimizer.step()
    assert plain.steps == padded.steps
    assert plain.optimizer.thresholds != {"(model)": 0.5}
    assert plain.optimizer.thresholds == pytest.approx(padded.optimizer.thresholds, rel=1e-5)


def test_a_refused_batch_moves_nothing() -> None:
    private = adaptive_model()
    hand_over(private, 6)
    x, y = batch()
    weight = private.model._module[0].weight
    with pytest.raises(PrivacyViolationError):
        (loss_of(private.model, x, y) + weight.square().sum()).backward()
    with pytest.raises(PrivacyViolationError):
        private.optimizer.step()
    private.optimizer.zero_grad()
    assert private.optimizer.thresholds == {"(model)": 0.5}
    train_step(private)
    other = adaptive_model()
    train_step(other)
    assert private.optimizer.thresholds == other.optimizer.thresholds != {"(model)": 0.5}


def test_a_batch_that_is_left_counts_for_nothing() -> None:
    private, other = adaptive_model(), adaptive_model()
    hand_over(private, 6)
    loss_of(private.model, *batch()).backward()
    private.optimizer.zero_grad()
    for each in (private, other):
        train_step(each, 4)
    assert private.optimizer.thresholds == other.optimizer.thresholds


def test_gradients_may_be_cleared_by_the_model() -> None:
    private, other = adaptive_model(), adaptive_model()
    private.optimizer.keep_summed_grad = False
    for _ in range(3):
        train_step(other)
        private.model.zero_grad()
        hand_over(private, 6)
        loss_of(private.model, *batch()).backward()
        private.optimizer.step()
    assert private.optimizer.thresholds == other.optimizer.thresholds


def test_a_mean_in_single_precision_is_refused_and_a_criterion_trains() -> None:
    clipping = BackpropClipping(threshold=adaptive(initial=0.5))
    with pytest.raises(ValueError, match=r"counted differently all at once\. Pass the criterion"):
        make_private(mlp(), backprop=clipping)
    with pytest.raises(ValueError, match=r"counted differently all at once\. Pass the criterion"):
        BackpropClipHooks(mlp(), config=clipping)
    engine, model = PrivacyEngine(), mlp()
    data = DataLoader(dataset(), batch_size=8)
    private, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        backprop=clipping,
        criterion=nn.CrossEntropyLoss(),
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(private(x), y).backward()
        optimizer.step()
    assert engine.accountant.history == [(1.0, 0.25, 4)]
    assert optimizer.thresholds != {"(model)": 0.5}


@pytest.mark.parametrize("allocation", ["joint", "equal"])
def test_a_compiled_model_counts_as_an_eager_one(allocation: Any) -> None:
    clipping = BackpropClipping(allocation=allocation, threshold=adaptive(initial=0.5))
    eager, compiled = (adaptive_model(backprop=clipping) for _ in range(2))
    call = torch.compile(compiled.model, backend="aot_eager")
    for size in (6, 4, 0, 5):
        train_step(eager, size)
        compiled.optimizer.zero_grad()
        hand_over(compiled, size)
        x, y = batch(size)
        loss_of(call, x, y).backward()
        compiled.optimizer.step()
    assert eager.optimizer.thresholds != {"(model)": 0.5}
    assert eager.optimizer.thresholds == pytest.approx(compiled.optimizer.thresholds, rel=1e-5)


def test_equal_shares_begin_at_the_initial_threshold_and_others_in_proportion() -> None:
    clipping = layerwise(allocation={"0": 3.0, "2": 1.0}, threshold=adaptive(initial=0.5))
    found = adaptive_model(backprop=clipping).optimizer.thresholds
    assert found == pytest.approx({"0": 0.5 * math.sqrt(1.5), "2": 0.5 * math.sqrt(0.5)})
