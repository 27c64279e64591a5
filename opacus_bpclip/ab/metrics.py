"""What a model is judged by on the test set; each metric has update and compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.ab.batches import Batch, logits_in
from opacus_bpclip.ab.criterion import Criterion
from opacus_bpclip.ab.results import Measure
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.probe.leaves import map_leaves

_IGNORED = nn.CrossEntropyLoss().ignore_index


class Accuracy:
    """The share of targets that are classified rightly.

    Outputs are ``[B, C, ...]``, targets classes ``[B, ...]`` or probabilities like the outputs.
    Targets that cross-entropy ignores do not count.
    """

    higher_is_better = True

    def __init__(self) -> None:
        self._right = self._all = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        if targets.shape == outputs.shape:
            targets = targets.argmax(1)
        counted = targets != _IGNORED
        self._right += int((outputs.argmax(1) == targets)[counted].sum())
        self._all += int(counted.sum())

    def compute(self) -> float:
        """Return the share."""
        return self._right / max(self._all, 1)


class MeanLoss:
    """The mean of the examples' losses."""

    higher_is_better = False

    def __init__(self, criterion: Criterion) -> None:
        self._criterion = copy.deepcopy(criterion)
        self._criterion.reduction = "none"
        self._losses: list[Tensor] = []

    def update(self, outputs: Any, targets: Any) -> None:
        """Keep a batch's losses."""
        self._losses.append(self._criterion(outputs, targets))

    def compute(self) -> float:
        """Return their mean."""
        return float(torch.cat(self._losses).mean())


class OfAll:
    """A function of all outputs and targets of the test set."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        self._function = function
        self._kept: list[tuple[Any, Any]] = []

    def update(self, outputs: Any, targets: Any) -> None:
        """Keep a batch."""
        self._kept.append((outputs, targets))

    def compute(self) -> Any:
        """Return the function's value."""
        return self._function(*(_joined(parts) for parts in zip(*self._kept, strict=True)))


def _joined(parts: tuple[Any, ...]) -> Tensor:
    tensors = all(isinstance(part, Tensor) for part in parts)
    if not tensors or len({part.shape[1:] for part in parts}) > 1:
        raise UsageError(
            "a --metric that is a function gets all outputs and all targets of the test set, each "
            "as one tensor, and these are not tensors of one shape: give an object with update and "
            "compute"
        )
    return torch.cat(parts)


def metric_of(found: Any, path: str, *, lower_is_better: bool) -> tuple[Any, Measure]:
    """Return an empty metric, to be copied, and what a report says of it.

    Args:
        found: an object with update and compute, or a function of outputs and targets.
        path: what errors call it; the last part is its name.
        lower_is_better: of one that does not say so itself.

    Raises:
        UsageError: it is something else.
    """
    higher = getattr(found, "higher_is_better", None)
    measure = Measure(
        name=path.rpartition(":")[2],
        higher_is_better=not lower_is_better if higher is None else bool(higher),
    )
    if hasattr(found, "update") and hasattr(found, "compute"):
        return found, measure
    if not callable(found):
        raise UsageError(f"{path} is neither a function nor an object with update and compute")
    return OfAll(found), measure


def value_of(metric: Any, model: nn.Module, batches: Any, device: torch.device) -> float:
    """Return what a metric says of a model, which keeps its mode.

    The mean loss gets what the model returns; any other metric gets the logits of outputs that have
    some.

    Args:
        metric: it is copied.
        model: what makes the outputs.
        batches: of the test set.
        device: where the model is; the metric gets everything on the CPU.
    """
    metric, was_training = copy.deepcopy(metric), model.training
    model.eval()
    try:
        with torch.no_grad():
            for each in batches:
                batch = Batch.of(each, device)
                outputs = batch.outputs_of(model)
                if not isinstance(metric, MeanLoss):
                    outputs = logits_in(outputs)
                metric.update(*map_leaves((outputs, batch.targets), _on_cpu))
            return float(metric.compute())
    finally:
        model.train(was_training)


def _on_cpu(own: Any) -> Any:
    return own.cpu() if isinstance(own, Tensor) else own
