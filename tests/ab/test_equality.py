"""Where clipping is flat's, number for number, so is the training: the final weights agree."""

import pytest
import torch
from opacus.optimizers.optimizer import _generate_noise

from opacus_bpclip.ab import training
from opacus_bpclip.ab.batches import Batch
from opacus_bpclip.ab.results import Plan
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.task import task_of
from opacus_bpclip.jobs.quiet import known_warnings_silenced

STEPS = 12
PLAN = Plan(1 / STEPS, STEPS, 1.0, (), 9258, 1437, 360)


def add_noise_as_opacus(gradients, *, std, generator, secure_mode):
    """Draw for one parameter after the other; the library draws for many at once."""
    for gradient in gradients:
        gradient += _generate_noise(std, gradient, generator, secure_mode)


@pytest.fixture(scope="module")
def digits():
    return task_of(Settings())


@pytest.fixture
def train(digits, monkeypatch):
    """Return a function that trains an arm for an epoch: weights before and after, and losses."""
    monkeypatch.setattr("opacus_bpclip.optimizer.optimizer.add_noise_", add_noise_as_opacus)

    @known_warnings_silenced()
    def train(name, **given):
        settings = Settings(epochs=1, threads=1, **given)
        arm = training.start(name, 0, settings, PLAN, digits)
        before = weights_of(arm)
        losses = [training.step(arm, Batch.of(batch, arm.device)).item() for batch in arm.loader]
        return before, weights_of(arm), torch.tensor(losses)

    return train


def weights_of(arm):
    return torch.cat([p.detach().flatten().clone() for p in arm.model.parameters()])


@pytest.mark.parametrize(("flat", "norm"), [("flat", None), ("flat+input-clipping", 3.0)])
@pytest.mark.parametrize("max_grad_norm", [0.1, 1.0])
def test_an_epoch_ends_at_the_weights_of_flat_clipping(flat, norm, max_grad_norm, train):
    given = {"max_input_norm": norm, "max_grad_norm": max_grad_norm}
    before, expected, expected_losses = train(flat, **given)
    also_before, found, losses = train("backprop", **given)
    assert torch.equal(also_before, before)
    assert len(losses) == STEPS
    moved = (expected - before).norm()
    assert moved > 0.05
    assert (found - expected).norm() < 1e-4 * moved
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other", ["flat+input-clipping", "backprop-layerwise", "backprop-whitened", "paper"]
)
def test_other_arms_end_elsewhere(other, train):
    before, flat, _ = train("flat")
    _, found, _ = train(other)
    assert (found - flat).norm() > 0.01 * (flat - before).norm()
