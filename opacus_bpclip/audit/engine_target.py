"""Targets that this package's engine and optimizer train, with any model and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip.audit.target import LARGE, Batch, Target, Trainer, rows, spiked
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.engine.engine import PrivacyEngine
from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.jobs.quiet import known_warnings_silenced
from opacus_bpclip.optimizer.scales import noise_of
from opacus_bpclip.probe.randomness import Steady

Loss = Callable[..., Tensor]
Inputs = Callable[[int], "Tensor | Batch"]

_EXPECTED_BATCH_SIZE = 4
# What `model_target` tries: so many examples, and so many with single large entries.
_EXAMPLES = 4
_SPIKES = 16


def linear_loss(reduction: str) -> Loss:
    """Return a loss that hands its target to the model's outputs as their gradient.

    It is the worst loss: the attacker chooses every upstream gradient, of any size.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the batch.
    """

    def loss(output: Tensor, upstream: Tensor) -> Tensor:
        total = (output.flatten(1) * upstream.flatten(1)).sum()
        return total / max(len(output), 1) if reduction == "mean" else total

    return loss


class EngineTrainer(Trainer):
    """A model behind ``PrivacyEngine.make_private(clipping="backprop")``, as users train it.

    The learning rate is not zero: every step moves the parameters.

    Args:
        make_model: makes a model, which is called with a batch's first tensor.
        loss: called with the model's output and the batch's other tensors; ``None`` for the worst
            one, `linear_loss`.
        noise_multiplier: of the noise.
        max_grad_norm: joint L2 sensitivity.
        loss_reduction: ``"mean"`` or ``"sum"``, how the loss reduces over the batch.
        clipping: the options.
        device: where to train; batches go there, and what is released comes back.
        steady: of a model that draws random numbers, as dropout does: makes them equal for all
            examples. Neighbours could not be compared if each batch drew numbers of its own.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        loss: Loss | None,
        noise_multiplier: float,
        *,
        max_grad_norm: float = 1.0,
        loss_reduction: str = "mean",
        clipping: BackpropClipping | None = None,
        device: torch.device | str = "cpu",
        steady: Steady | None = None,
    ) -> None:
        self._device = torch.device(device)
        model = make_model().to(self._device)
        # One batch an epoch, so that the sampling rate is 1: the audit's worlds are not sampled.
        data = TensorDataset(torch.zeros(_EXPECTED_BATCH_SIZE))
        with known_warnings_silenced():
            self._engine = PrivacyEngine()
            self._model, self._optimizer, _ = self._engine.make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                data_loader=DataLoader(data, batch_size=_EXPECTED_BATCH_SIZE),
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                loss_reduction=loss_reduction,
                poisson_sampling=False,
                clipping="backprop",
                backprop=clipping,
            )
        self._loss = loss or linear_loss(loss_reduction)
        self._drawing = steady or nullcontext()
        self._runs_empty = True
        own = self._optimizer._hooks._sensitivities
        self._thresholds = own.state_dict()
        super().__init__(
            [*self._optimizer.params, *own.counts.values()],
            noise_multiplier=noise_multiplier,
            sensitivity=max_grad_norm,
            divisor=_EXPECTED_BATCH_SIZE if loss_reduction == "mean" else 1.0,
        )

    def compute(self, batch: Batch) -> None:
        """Run the model and the loss, forward and backward.

        A few of torch's layers cannot run on an empty batch. There, as in users' training loops,
        the step follows without a backward pass.
        """
        self._optimizer.zero_grad()
        inputs, *targets = (x.to(self._device) for x in batch)
        if not len(inputs) and not self._runs_empty:
            return
        try:
            with self._drawing:
                self._loss(self._model(inputs), *targets).backward()
        except (IndexError, RuntimeError, ValueError) as error:
            if len(inputs) or isinstance(error, PrivacyViolationError):
                raise
            self._runs_empty = False
            self._optimizer.zero_grad()

    def step(self) -> None:
        """Step the private optimizer."""
        self._optimizer.step()

    def restart(self) -> None:
        """Put the parameters, the thresholds and the whitening back to their first values."""
        super().restart()
        self._optimizer._hooks._whitening.restart()
        self._optimizer._hooks._sensitivities.load_state_dict(self._thresholds)

    def release(self) -> Tensor | None:
        """Finish the step; return the noisy sums and counts, all in the same units of noise.

        A layer with noise of its own, and the counts of examples, are multiplied so that their
        noise is ``noise_multiplier * sensitivity``, too. Then all of it moves by ``sensitivity``.
        """
        own, whole = self._optimizer._hooks._sensitivities, self._optimizer._guard.parameters.whole
        units = {p: self.sensitivity / x for p, x in noise_of(own, 1.0, self.sensitivity).items()}
        self.step()
        if all(p.grad is None for p in self.parameters):
            return None
        counts = {count: own.released[name] for name, count in own.counts.items()}
        released = []
        for p in self.parameters:
            if p in counts:
                block = torch.tensor([counts[p] * units[p]])
            else:
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                block = gradient.flatten().cpu() * (self.divisor * units[whole(p)])
            # In the precision of the gradients, by which the audit judges rounding errors.
            released.append(block.to(self.parameters[0].dtype))
        return torch.cat(released)

    def history(self) -> Sequence[tuple[float, float, int]]:
        """Return the entries of the engine's accountant."""
        return tuple(self._engine.accountant.history)


def model_target(
    name: str,
    make_model: Callable[[], nn.Module],
    inputs: Inputs,
    *,
    loss: Loss | None = None,
    loss_reduction: str = "mean",
    max_grad_norm: float = 1.0,
    clipping: BackpropClipping | None = None,
) -> Target:
    """Return a target that trains a model of yours by this package's engine.

    Args:
        name: for reports.
        make_model: makes the model.
        inputs: makes a batch of that many examples: the model's input, and the loss's further
            arguments.
        loss: called with the model's output and the batch's other tensors. The default is the worst
            one: each example has its own gradient for every output.
        loss_reduction: ``"mean"`` or ``"sum"``, how the loss reduces over the batch.
        max_grad_norm: joint L2 sensitivity.
        clipping: the options.

    Raises:
        ValueError: the model's output is not one tensor, and no loss was given for it.

    Examples:
        >>> from opacus_bpclip.audit import audit
        >>> target = model_target("mine", lambda: nn.Linear(3, 2), lambda n: torch.randn(n, 3))
        >>> audit(target, trials=0).outcome
        'pass'
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = inputs(_EXAMPLES)
        batch = made if isinstance(made, tuple) else (made,)
        model, steady = make_model(), Steady()
        with steady, torch.no_grad():
            output = model(batch[0])
        if loss is None:
            batch = (batch[0], _upstream(output))
        canaries = tuple(_canaries(batch, with_spikes=loss is None))

    make = partial(
        EngineTrainer,
        make_model,
        loss,
        max_grad_norm=max_grad_norm,
        loss_reduction=loss_reduction,
        clipping=clipping,
        # It costs time in every operation.
        steady=steady if steady.random else None,
    )
    return Target(name=name, make=make, batches=(batch,), canaries=canaries)


def _upstream(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model's output is a {type(output).__name__}, not one tensor; name a loss that "
            "takes it"
        )
    return torch.randn(output.shape)


def _canaries(batch: Batch, *, with_spikes: bool) -> Iterator[Batch]:
    """Yield examples as they are, far too large, and with single large entries."""
    for i in range(len(batch[0])):
        example = rows(batch, [i])
        yield example
        yield tuple(t * LARGE if t.is_floating_point() else t for t in example)
    if not with_spikes:
        return
    x, g = rows(batch, [0])
    for place in torch.randperm(g.numel())[:_SPIKES].tolist():
        # The same relative place in input and output: layers that keep positions meet there.
        there = place * x.numel() // g.numel()
        yield spiked(x, [there]) if x.is_floating_point() else x, spiked(g, [place])
