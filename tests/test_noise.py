"""The noise has its one law, whatever the batch, the model and the parameters."""

from __future__ import annotations

import sys

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from opacus_bpclip import PrivacyEngine
from tests.helpers import (
    CLASSES,
    FEATURES,
    batch,
    dataset,
    flat,
    make_private,
    mlp,
    noise,
    seeded,
    step_on,
    summed,
    train_step,
    values,
)


def empty_batch() -> tuple[Tensor, Tensor]:
    return torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize("size", [0, 1, 6], ids=["empty", "one example", "batch"])
def test_noise_has_the_promised_scale_and_no_other(size: int) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(FEATURES, 40_000), nn.Linear(40_000, CLASSES))
    private = seeded(model=model)
    step_on(private, *(empty_batch() if size == 0 else batch(size)))
    sample = noise(private).double().numpy() / (1.3 * 0.7)
    assert len(sample) > 300_000
    assert stats.kstest(sample, "norm").pvalue > 0.01
    for wrong in (0.95, 1.05):
        assert stats.kstest(sample * wrong, "norm").pvalue < 1e-9


def test_empty_batches_still_step_and_are_accounted() -> None:
    empty, full = seeded(), seeded()
    before = values(empty)
    step_on(empty, *empty_batch())
    train_step(full)
    assert torch.equal(summed(empty), torch.zeros_like(before))
    # The very same draws: nothing about the noise depends on the batch.
    torch.testing.assert_close(noise(empty), noise(full), atol=1e-5, rtol=0)
    torch.testing.assert_close(values(empty), before - 0.1 * noise(empty) / 8)
    assert empty.engine.accountant.history == full.engine.accountant.history == [(1.3, 0.25, 1)]


def test_a_step_without_any_backward_pass_is_noise_alone() -> None:
    private = seeded()
    private.optimizer.step()
    assert torch.equal(summed(private), torch.zeros_like(values(private)))
    assert noise(private).std() > 0.5
    assert private.steps == 1


def test_every_step_draws_fresh_noise_for_every_parameter() -> None:
    private = seeded(model=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), data=dataset())
    draws = []
    for _ in range(2):
        private.optimizer.zero_grad()
        private.optimizer.step()
        draws += [p.grad.flatten()[:4].clone() for p in private.parameters]
    values_drawn = torch.cat(draws)
    assert len(values_drawn.unique()) == len(values_drawn)


def test_without_noise_the_step_is_the_clipped_sum_over_the_expected_batch_size() -> None:
    private = make_private(mlp(), lr=0.5)
    before = values(private)
    train_step(private)
    torch.testing.assert_close(values(private), before - 0.5 * summed(private) / 8)


def test_parameters_without_a_gradient_get_noise() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    private = seeded(model=model)
    before = flat(model.unused.parameters()).clone()
    train_step(private)
    assert not model.unused.weight.summed_grad.any()
    assert (flat(model.unused.parameters()) != before).all()


def test_frozen_parameters_are_neither_noised_nor_moved() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    private = seeded(model=model)
    before = model[0].weight.clone()
    for _ in range(2):
        train_step(private)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


def test_noise_is_added_in_the_parameters_precision() -> None:
    private = make_private(mlp(dtype=torch.float64), noise_multiplier=1.0)
    x, y = batch()
    step_on(private, x.double(), y)
    assert {p.grad.dtype for p in private.parameters} == {torch.float64}
    assert not torch.equal(noise(private), noise(private).float().double())


def test_secure_mode_without_its_package_is_refused_by_opacus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchcsprng", None)
    with pytest.raises(ImportError, match="you must install the torchcsprng package"):
        PrivacyEngine(secure_mode=True)
