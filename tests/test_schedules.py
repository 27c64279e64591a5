"""``max_grad_norm`` and the noise multiplier may change between steps, but not within one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.schedulers import (
    ExponentialGradClip,
    ExponentialNoise,
    LambdaGradClip,
    LambdaNoise,
    StepGradClip,
    StepNoise,
)

from opacus_bpclip import PrivacyViolationError
from tests.budgets import layerwise
from tests.helpers import (
    backward,
    batch,
    flat,
    loss_of,
    make_private,
    mlp,
    noise,
    seeded,
    summed,
    train_step,
)

NORMALIZE = layerwise(normalize=True, stability=1e-30)


def test_max_grad_norm_moves_every_sensitivity_and_the_noise() -> None:
    private = seeded(backprop=NORMALIZE, noise_multiplier=0.0)
    parts = dict(private.optimizer.layer_sensitivities)
    private.optimizer.max_grad_norm = 1.4
    assert private.optimizer.layer_sensitivities == pytest.approx(
        {name: 2 * part for name, part in parts.items()}
    )
    train_step(private, size=1)
    for name, limit in private.optimizer.layer_sensitivities.items():
        layer = private.handle._module.get_submodule(name)
        norm = flat(p.summed_grad for p in layer.parameters()).norm()
        assert 0.999 * limit < norm <= limit
    first, second = seeded(), seeded()
    second.optimizer.max_grad_norm = 1.4
    for each in (first, second):
        each.optimizer.step()
    torch.testing.assert_close(noise(second), 2 * noise(first))


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, None, [1.0]], ids=str)
def test_max_grad_norm_must_stay_a_finite_number_above_zero(value: Any) -> None:
    private = make_private(mlp())
    with pytest.raises(ValueError, match="Expected max_grad_norm=") as refusal:
        private.optimizer.max_grad_norm = value
    assert str(refusal.value) == f"Expected max_grad_norm={value!r} to be a finite number > 0."
    assert private.optimizer.max_grad_norm == 1.0


def test_max_grad_norm_cannot_change_while_clipped_gradients_wait_for_noise() -> None:
    # Opacus's ghost clipping lets a scheduler shrink the noise without shrinking the gradients.
    private = make_private(mlp())
    owner = private.optimizer
    backward(private)
    with pytest.raises(PrivacyViolationError) as refusal:
        owner.max_grad_norm = 0.01
    assert str(refusal.value) == (
        "max_grad_norm was set in the middle of a logical batch. Gradients clipped to the old "
        "value would get the new value's noise. Set it between step() and backward()."
    )
    assert owner.max_grad_norm == 1.0
    private.optimizer.step()
    owner.max_grad_norm = 0.01
    private.optimizer.zero_grad()
    train_step(private)
    assert summed(private).norm() <= 6 * 0.01


def test_max_grad_norm_may_change_between_forward_and_backward() -> None:
    # The refusal of a change in the middle of a batch says so.
    private = make_private(mlp(), backprop=NORMALIZE)
    loss = loss_of(private.model, *batch(1))
    private.optimizer.max_grad_norm = 0.02
    loss.backward()
    private.optimizer.step()
    assert 0.999 * 0.02 < summed(private).norm() <= 0.02


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        pytest.param(
            lambda o: ExponentialGradClip(o, gamma=0.5), [1.0, 0.5, 0.25, 0.125], id="exponential"
        ),
        pytest.param(
            lambda o: LambdaGradClip(o, scheduler_function=lambda epoch: 1 / (1 + epoch)),
            [1.0, 1 / 2, 1 / 3, 1 / 4],
            id="lambda",
        ),
        pytest.param(
            lambda o: StepGradClip(o, step_size=2, gamma=0.1), [1.0, 1.0, 0.1, 0.1], id="step"
        ),
    ],
)
def test_clip_schedulers_move_the_gradients_and_the_noise_together(
    schedule: Callable[[Any], Any], expected: list[float]
) -> None:
    private = seeded(backprop=NORMALIZE, noise_multiplier=1e-4, max_grad_norm=1.0)
    scheduler = schedule(private.optimizer)
    for norm in expected:
        train_step(private, size=1)
        assert private.optimizer.max_grad_norm == pytest.approx(norm)
        assert 0.999 * norm < summed(private).norm() <= norm
        assert 0.5e-4 * norm < noise(private).std() < 2e-4 * norm
        scheduler.step()
    assert private.engine.accountant.history == [(1e-4, 0.25, len(expected))]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        pytest.param(lambda o: ExponentialNoise(o, gamma=0.5), [8.0, 4.0, 2.0], id="exponential"),
        pytest.param(
            lambda o: LambdaNoise(o, noise_lambda=lambda epoch: 1 + epoch),
            [8.0, 16.0, 24.0],
            id="lambda",
        ),
        pytest.param(lambda o: StepNoise(o, step_size=2, gamma=0.1), [8.0, 8.0, 0.8], id="step"),
    ],
)
def test_noise_schedulers_move_the_noise_and_the_account_together(
    schedule: Callable[[Any], Any], expected: list[float]
) -> None:
    private = seeded(noise_multiplier=8.0)
    unit = seeded(noise_multiplier=1.0)
    scheduler = schedule(private.optimizer)
    accounted = []
    for multiplier in expected:
        train_step(private)
        train_step(unit)
        torch.testing.assert_close(noise(private), multiplier * noise(unit), atol=1e-4, rtol=1e-4)
        accounted.append(private.engine.accountant.history[-1][0])
        scheduler.step()
    assert accounted == pytest.approx(expected)
    assert private.steps == len(expected)
