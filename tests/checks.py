"""The suite's checks as functions: the tests run them, and so do the mutants they must kill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipOptimizer, BackpropClipping, PrivacyEngine

# What cancellation in S(D + z) - S(D) may add, relative to the sensitivity.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}

Loss = Callable[[Tensor, Tensor, str], Tensor]


def linear_loss(output: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Give every output exactly the gradient ``target``, of any scale."""
    total = (output.flatten(1) * target).sum()
    return total / len(output) if reduction == "mean" and len(output) else total


def squared_loss(output: Tensor, target: Tensor, reduction: str) -> Tensor:
    total = (output.flatten(1) - target).square().sum()
    return total / len(output) if reduction == "mean" and len(output) else total


class Trainer:
    """A model behind the real engine and optimizer, with the noise off by default."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        clipping: BackpropClipping,
        *,
        max_grad_norm: float = 1.0,
        noise_multiplier: float = 0.0,
        reduction: str = "mean",
        loss: Loss = linear_loss,
        expected_batch_size: int = 4,
        dtype: torch.dtype = torch.float64,
        noise_generator: torch.Generator | None = None,
        probe: bool = False,
    ) -> None:
        # Searches make thousands of trainers of the same few architectures.
        clipping = dataclasses.replace(clipping, probe=probe)
        self.plain = model.to(dtype)
        self.reduction = reduction
        self.loss = loss
        data = TensorDataset(torch.zeros(4 * expected_batch_size, *shape, dtype=dtype))
        self.engine = PrivacyEngine()
        # A learning rate of zero: every batch meets the same parameters.
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=self.plain,
            optimizer=torch.optim.SGD(self.plain.parameters(), lr=0.0),
            data_loader=DataLoader(data, batch_size=expected_batch_size),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            loss_reduction=reduction,
            clipping="backprop",
            backprop=clipping,
            noise_generator=noise_generator,
        )
        assert isinstance(self.optimizer, BackpropClipOptimizer)
        self.optimizer.keep_summed_grad = True

    def step(self, x: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(x), target, self.reduction).backward()
        self.optimizer.step()

    def move(self, x: Tensor, target: Tensor, lr: float = 0.1) -> None:
        """Take a step that changes the parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = [p.detach().clone() for p in self.plain.parameters()]
        self.step(x, target)
        after = list(self.plain.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def released(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the clipped sum that the step would add noise to, one vector per layer."""
        self.step(x, target)
        return {
            name: torch.cat([p.summed_grad.detach().flatten() for p in group.parameters])
            for name, group in self.optimizer._hooks._groups.items()
        }


def joint(vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(vectors.values()))


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {layer: one[layer] - other[layer] for layer in one}


def check_sensitivity(trainer: Trainer, x: Tensor, target: Tensor) -> None:
    """Adding the last example moves the sum by at most Delta, each layer's by at most Delta_l."""
    with_z = trainer.released(x, target)
    without_z = trainer.released(x[:-1], target[:-1])
    moved = difference(with_z, without_z)
    slack = 1 + ROUNDING[target.dtype] * len(x)
    for layer, limit in trainer.optimizer.layer_sensitivities.items():
        assert moved[layer].isfinite().all(), f"{layer}: not finite"
        assert moved[layer].norm() <= limit * slack, f"{layer}: {moved[layer].norm()} > {limit}"
    limit = trainer.optimizer.max_grad_norm
    assert joint(moved).norm() <= limit * slack, f"joint: {joint(moved).norm()} > {limit}"


def check_training(trainer: Trainer, x: Tensor, target: Tensor, steps: int = 3) -> None:
    """Every step, with parameters that move, is within the sensitivity and independent."""
    for _ in range(steps):
        check_sensitivity(trainer, x, target)
        check_independence(trainer, x, target)
        trainer.move(x, target)


def check_independence(trainer: Trainer, x: Tensor, target: Tensor) -> None:
    """The sum over a batch is the sum of what its examples contribute alone."""
    together = joint(trainer.released(x, target))
    alone = sum(
        (joint(trainer.released(x[i : i + 1], target[i : i + 1])) for i in range(len(x))),
        torch.zeros_like(together),
    )
    tolerance = ROUNDING[target.dtype] * trainer.optimizer.max_grad_norm * (1 + len(x))
    assert (together - alone).norm() <= tolerance


def check_silent(trainer: Trainer, x: Tensor, target: Tensor) -> None:
    """The last example, not finite, contributes exactly zero."""
    with_z = joint(trainer.released(x, target))
    without_z = joint(trainer.released(x[:-1], target[:-1]))
    assert with_z.isfinite().all()
    assert torch.allclose(with_z, without_z, rtol=0, atol=1e-12 * trainer.optimizer.max_grad_norm)


def check_noise_scale(trainer: Trainer, x: Tensor, target: Tensor, steps: int) -> None:
    """The noise before division has standard deviation ``noise_multiplier * max_grad_norm``."""
    divisor = trainer.optimizer.expected_batch_size if trainer.reduction == "mean" else 1
    draws = []
    for _ in range(steps):
        trainer.step(x, target)
        draws += [(p.grad * divisor - p.summed_grad).flatten() for p in trainer.plain.parameters()]
    noise = torch.cat(draws)
    expected = trainer.optimizer.noise_multiplier * trainer.optimizer.max_grad_norm
    # Five standard errors of a standard deviation.
    assert abs(noise.std() / expected - 1) < 5 / (2 * len(noise)) ** 0.5
    assert abs(noise.mean()) < 5 * expected / len(noise) ** 0.5


def check_one_entry_per_step(trainer: Trainer, x: Tensor, target: Tensor, steps: int) -> None:
    """The accountant sees one (noise multiplier, sample rate) a step, whatever the layers."""
    for _ in range(steps):
        trainer.step(x, target)
    rate = 1 / len(trainer.loader)
    assert trainer.engine.accountant.history == [(trainer.optimizer.noise_multiplier, rate, steps)]
