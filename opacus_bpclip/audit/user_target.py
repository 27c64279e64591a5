"""A user's own model and loss as something to audit, behind the package's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from opacus_bpclip.audit.engine_target import EngineTrainer, Loss
from opacus_bpclip.audit.target import LARGE, Batch, Target, rows, spiked
from opacus_bpclip.config import BackpropClipping

Inputs = Callable[[int], "Tensor | Batch"]

_EXAMPLES = 4
_SPIKES = 16


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
    """Return a model of one's own as something to audit.

    Args:
        name: for reports.
        make_model: makes the model.
        inputs: makes a batch of that many examples: the model's input, and whatever else the loss
            takes.
        loss: called with the model's output and the batch's other tensors. Without it the attacker
            has the worst one: each example brings its own gradient for every output.
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
        if loss is None:
            batch = (batch[0], _upstream(make_model(), batch[0]))
        canaries = tuple(_canaries(batch, with_spikes=loss is None))

    make = partial(
        EngineTrainer,
        make_model,
        loss,
        max_grad_norm=max_grad_norm,
        loss_reduction=loss_reduction,
        clipping=clipping,
    )
    return Target(name=name, make=make, batches=(batch,), canaries=canaries)


def _upstream(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(x)
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
