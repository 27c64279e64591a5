"""What users do around training: checkpointing, in-place activations, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.budgets import layerwise
from tests.helpers import (
    BOUNDS,
    CLASSES,
    backward,
    batch,
    loss_of,
    make_private,
    mlp,
    model_of,
    summed,
    switchable,
    train_step,
    values,
)


def test_checkpointing_without_reentry_gives_the_identical_gradient() -> None:
    plain, saved = switchable(), switchable()
    model_of(saved).trick = lambda m, x: m.head(
        torch.relu(checkpoint(m.body, x, use_reentrant=False))
    )
    for _ in range(2):
        train_step(plain)
        train_step(saved)
        assert torch.equal(summed(plain), summed(saved))


@BOUNDS
def test_in_place_activations_train_like_ordinary_ones(bound: Any) -> None:
    plain, inplace = (
        make_private(mlp(inplace=flag), backprop=layerwise(bound=bound)) for flag in (False, True)
    )
    for _ in range(2):
        train_step(plain)
        train_step(inplace)
        assert torch.equal(summed(plain), summed(inplace))


def test_gradients_are_clipped_in_evaluation_mode_too() -> None:
    private = switchable(max_grad_norm=1e-3)
    private.model.eval()
    backward(private)
    private.optimizer.step()
    assert 0 < summed(private).norm() <= 6e-3


@pytest.mark.parametrize(
    "guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_evaluation_between_batches_disturbs_nothing(guard: Callable[[], Any]) -> None:
    plain, evaluated = switchable(), switchable()
    backward(plain)
    loss = loss_of(evaluated.model, *batch())
    with guard():
        # Layers may be called on their own here, as often as one likes.
        model_of(evaluated).head(model_of(evaluated).body(batch(3)[0]))
        evaluated.model(batch(3)[0])
    loss.backward()
    with guard():
        evaluated.model(batch(2)[0])
    plain.optimizer.step()
    evaluated.optimizer.step()
    assert torch.equal(summed(plain), summed(evaluated))


def test_a_batch_that_was_never_trained_on_disturbs_nothing() -> None:
    plain, twice = switchable(), switchable()
    backward(plain)
    twice.model(batch(3)[0])
    backward(twice)
    plain.optimizer.step()
    twice.optimizer.step()
    assert torch.equal(summed(plain), summed(twice))


def test_a_layer_that_is_not_used_gets_zeros() -> None:
    private = switchable()
    model_of(private).trick = lambda m, x: m.body(x)[:, :CLASSES]
    backward(private)
    private.optimizer.step()
    assert torch.equal(model_of(private).head.weight.summed_grad, torch.zeros(CLASSES, 8))
    assert model_of(private).body.weight.summed_grad.norm() > 0


def test_the_optimizer_that_was_passed_in_finds_nothing_to_step_on() -> None:
    private = make_private(mlp(), noise_multiplier=1.0)
    before = values(private)
    backward(private)
    private.optimizer.original_optimizer.step()
    assert torch.equal(values(private), before)
    private.optimizer.step()
    assert not torch.equal(values(private), before)
