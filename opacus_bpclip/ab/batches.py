"""What is in a batch: the model's input and the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.losses.losses import logits_of
from opacus_bpclip.probe.leaves import batch_size, map_leaves

_LABELS = ("labels", "label", "targets", "target")


@dataclass(frozen=True)
class Batch:
    """A batch, taken apart.

    Args:
        args: the model's positional arguments.
        kwargs: its keyword arguments.
        targets: what the loss compares the output with.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any

    @classmethod
    def of(cls, batch: Any, device: torch.device) -> Batch:
        """Take apart what a loader yields, and move it.

        Args:
            batch: ``(input, ..., targets)``; a mapping, of which the model gets all but the labels
                by keyword, also in the place of the inputs; or a tensor, which is its own target.
            device: where to.

        Raises:
            UsageError: it is something else, or a mapping without labels.
        """
        batch = map_leaves(batch, lambda own: own.to(device) if hasattr(own, "to") else own)
        if isinstance(batch, Tensor):
            return cls((batch,), {}, batch)
        if isinstance(batch, Mapping):
            kwargs = dict(batch)
            label = next((name for name in _LABELS if name in kwargs), None)
            if label is None:
                raise UsageError(
                    f"a batch has the keys {', '.join(map(repr, kwargs))}, and no labels: name "
                    f"them {' or '.join(map(repr, _LABELS[:2]))}, or make items (input, target)"
                )
            targets = kwargs.pop(label)
            return cls((), kwargs, targets)
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise UsageError(
                f"a batch is a {type(batch).__name__}, not inputs and targets: make items "
                "(input, target), dictionaries with 'labels', or tensors"
            )
        *args, targets = batch
        if len(args) == 1 and isinstance(args[0], Mapping):
            return cls((), dict(args[0]), targets)
        return cls(tuple(args), {}, targets)

    @property
    def size(self) -> int:
        """The number of examples."""
        return batch_size(self.args, self.kwargs, axis=0) or 0

    def parts(self, rows: int) -> Iterator[Batch]:
        """Yield parts of at most this many examples."""
        for start in range(0, self.size, rows):
            yield self.part(slice(start, start + rows))

    def part(self, rows: slice) -> Batch:
        """Return some of the examples."""
        whole = (self.args, self.kwargs, self.targets)
        return Batch(*map_leaves(whole, partial(_cut, rows=rows)))

    def outputs_of(self, model: nn.Module) -> Any:
        """Return what the model makes of it."""
        return model(*self.args, **self.kwargs)


def logits_in(outputs: Any) -> Any:
    """Return the logits in a model's output, or if it has none, the output."""
    try:
        return logits_of(outputs)
    except ValueError:
        return outputs


def _cut(own: Any, rows: slice) -> Any:
    return own[rows] if isinstance(own, Tensor) and own.dim() else own
