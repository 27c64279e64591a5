"""The suite's checks as functions: the tests run them, and so do the mutants they must kill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import (
    BackpropClipOptimizer,
    BackpropClipping,
    FoldViews,
    PrivacyEngine,
    PrivacyViolationError,
)
from tests.devices import device, generator_there, there
from tests.strategies.options import of_the_trainer

# What cancellation in S(D + z) - S(D) may add, relative to the sensitivity.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-5}

# Far above every limit.
HUGE = 1e4

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
        criterion: nn.Module | None = None,
        autocast: bool = False,
    ) -> None:
        # Searches make thousands of trainers of the same few architectures.
        clipping = with_probes(dataclasses.replace(clipping, probe=probe), model, shape)
        self.plain = model.to(device=device(), dtype=dtype)
        self.reduction = reduction
        self.loss = loss
        self.autocast = autocast
        data = TensorDataset(torch.zeros(4 * expected_batch_size, *shape, dtype=dtype))
        self.engine = PrivacyEngine()
        # A learning rate of zero: every batch meets the same parameters.
        self.model, self.optimizer, *private, self.loader = self.engine.make_private(
            module=self.plain,
            optimizer=torch.optim.SGD(self.plain.parameters(), lr=0.0),
            data_loader=DataLoader(data, batch_size=expected_batch_size),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            loss_reduction=reduction,
            clipping="backprop",
            backprop=clipping,
            noise_generator=generator_there(noise_generator),
            criterion=criterion,
        )
        if private:
            (made,) = private
            self.loss = lambda output, target, _: made(output, target)
        assert isinstance(self.optimizer, BackpropClipOptimizer)
        self.optimizer.keep_summed_grad = True
        # The batches are made up, not sampled.
        self.optimizer._guard.passes.samples.attached = False

    def step(self, x: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.model(there(x)), there(target), self.reduction)
        loss.backward()
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
            name: torch.cat([p.summed_grad.detach().flatten() for p in group.parameters]).cpu()
            for name, group in self.optimizer._hooks._groups.items()
        }


def with_probes(
    clipping: BackpropClipping, model: nn.Module, shape: tuple[int, ...]
) -> BackpropClipping:
    """Give a whitening that was drawn its public examples; leave it out where it finds no layer."""
    if clipping.whitening is None or clipping.whitening.probes is not of_the_trainer:
        return clipping
    if not any(is_whitened(module) for module in model.modules()):
        return dataclasses.replace(clipping, whitening=None)
    # A model of views gets single rows in evaluation mode, in which public examples are run. These
    # are the same in every step, so that neighbouring batches meet the same matrices.
    shape = shape[1:] if isinstance(model, FoldViews) else shape
    examples = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    whitening = dataclasses.replace(clipping.whitening, probes=lambda _: examples)
    return dataclasses.replace(clipping, whitening=whitening)


def is_whitened(module: nn.Module) -> bool:
    """Return whether the weight's gradient is whitened, if it is not shared."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        ends = module._reversed_padding_repeated_twice
        if module.padding_mode != "zeros" or ends[::2] != ends[1::2]:
            return False
    elif type(module) is not nn.Linear:
        return False
    return module.weight.requires_grad


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
    """Every step is within the sensitivity and independent, also after parameters have changed."""
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
    apart = (together - alone).norm()
    assert apart <= tolerance, f"together and alone differ by {apart}"


def check_silent(trainer: Trainer, x: Tensor, target: Tensor) -> None:
    """The last example, not finite, contributes exactly zero."""
    with_z = joint(trainer.released(x, target))
    without_z = joint(trainer.released(x[:-1], target[:-1]))
    assert with_z.isfinite().all(), "the sum is not finite"
    moved = (with_z - without_z).norm()
    assert moved <= 1e-12 * trainer.optimizer.max_grad_norm, f"moved the sum by {moved}"


def draws_of(trainer: Trainer, x: Tensor, target: Tensor, steps: int) -> dict[str, Tensor]:
    """Return all that was added to the sums in some steps, before division, by parameter."""
    divisor = trainer.optimizer.expected_batch_size if trainer.reduction == "mean" else 1
    draws: dict[str, list[Tensor]] = {}
    for _ in range(steps):
        trainer.step(x, target)
        for name, p in trainer.plain.named_parameters():
            added = p.grad * divisor - p.summed_grad
            draws.setdefault(name, []).append(added.flatten().cpu())
    return {name: torch.cat(parts) for name, parts in draws.items()}


def check_noise_scale(trainer: Trainer, x: Tensor, target: Tensor, steps: int) -> None:
    """Every parameter's noise has standard deviation ``noise_multiplier * max_grad_norm``."""
    expected = trainer.optimizer.noise_multiplier * trainer.optimizer.max_grad_norm
    draws = draws_of(trainer, x, target, steps)
    for name, noise in {**draws, "all": torch.cat(list(draws.values()))}.items():
        # Five standard errors of a standard deviation, and of a mean.
        found = float(noise.std()) / expected
        assert abs(found - 1) < 5 / (2 * len(noise)) ** 0.5, f"{name}: noise {found} times as wide"
        assert abs(noise.mean()) < 5 * expected / len(noise) ** 0.5, f"{name}: not centred"


def check_noise_is_fresh(trainer: Trainer, x: Tensor, target: Tensor, steps: int) -> None:
    """No draw is used twice, in one step or in two, and each has the precision of its dtype."""
    noise = torch.cat(list(draws_of(trainer, x, target, steps).values()))
    # Up to rounding: the sums that the noise was added to are taken away again.
    values = (noise / noise.std()).mul(2**24).round().sort().values
    assert (values.diff() == 0).sum() <= len(noise) / 1000, "the same noise was drawn twice"
    rounded = noise.to(torch.bfloat16).to(noise.dtype)
    coarse = (noise - rounded).abs().median() / noise.abs().median()
    assert coarse > 1e-4, "the noise was drawn in lower precision"


def check_public_divisor(trainer: Trainer, x: Tensor, target: Tensor) -> None:
    """The sum is divided by the expected batch size, whatever the batch's own."""
    for count in range(len(x) + 1):
        trainer.step(x[:count], target[:count])
        for name, p in trainer.plain.named_parameters():
            public = p.summed_grad / trainer.optimizer.expected_batch_size
            assert torch.equal(p.grad, public), f"{name}: not divided by a public constant"


def check_one_entry_per_step(trainer: Trainer, x: Tensor, target: Tensor, steps: int) -> None:
    """The accountant sees one (noise multiplier, sample rate) a step, whatever the layers."""
    for _ in range(steps):
        trainer.step(x, target)
    _check_history(trainer, steps)


def check_one_entry_per_logical_batch(trainer: Trainer, epochs: int) -> None:
    """Physical batches of one example make one step and one entry of each logical batch."""
    steps = 0
    for _ in range(epochs):
        with BatchMemoryManager(
            data_loader=trainer.loader, max_physical_batch_size=1, optimizer=trainer.optimizer
        ) as loader:
            for (x,) in loader:
                outputs = trainer.model(x).flatten(1).shape[1]
                trainer.step(x, torch.ones(len(x), outputs, dtype=x.dtype))
                steps += not trainer.optimizer._is_last_step_skipped
    expected = epochs * len(trainer.loader)
    assert steps == expected, f"{steps} steps for {expected} logical batches"
    _check_history(trainer, expected)


def check_refused(trainer: Trainer, x: Tensor, loss: Callable[[Tensor, nn.Module], Tensor]) -> None:
    """A loss of the model's output that goes around the bound is an error on its batch."""
    trainer.optimizer.zero_grad()
    try:
        loss(trainer.model(x), trainer.plain).backward()
        trainer.optimizer.step()
    except PrivacyViolationError:
        return
    raise AssertionError("a gradient that nothing bounds was released")


def check_unmoved(trainer: Trainer, x: Tensor, meddle: Callable[[Tensor], None]) -> None:
    """What is done to ``p.grad`` between the backward pass and the step changes nothing."""
    trainer.optimizer.zero_grad()
    trainer.model(x).sum().backward()
    for p in trainer.plain.parameters():
        meddle(p)
    trainer.optimizer.step()
    for name, p in trainer.plain.named_parameters():
        norm = p.summed_grad.norm()
        limit = len(x) * trainer.optimizer.max_grad_norm
        assert norm <= limit, f"{name}: {norm} was put into a sum of at most {limit}"
        public = p.summed_grad / trainer.optimizer.expected_batch_size
        assert torch.equal(p.grad, public), f"{name}: released something beside its sum"


def _check_history(trainer: Trainer, steps: int) -> None:
    expected = [(trainer.optimizer.noise_multiplier, 1 / len(trainer.loader), steps)]
    found = trainer.engine.accountant.history
    assert found == expected, f"the accountant saw {found} instead of {expected}"
