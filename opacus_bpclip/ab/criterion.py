"""The loss of a comparison: one term for each example, whatever the user's own looks like."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from torch import Tensor, nn

from opacus_bpclip.ab.batches import logits_in
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.losses.losses import mean_of_counted

_REMEDY = (
    "Private training needs each example's own loss: give a criterion whose reduction='none' "
    "leaves a row for each example (torch.nn.CrossEntropyLoss, opacus_bpclip.CrossEntropy), or a "
    "function that returns [B, ...]"
)


class Criterion(nn.Module):
    """The mean over the examples of each example's own mean loss.

    Ghost clipping and this package set ``reduction`` to ``"none"`` and get ``[B]``. Torch's own
    losses, which take one tensor, get the logits of outputs that have some. All others get what the
    model returns.

    Args:
        found: a criterion with a ``reduction``, or a function of outputs and targets that takes
            ``reduction``, or that returns each example's loss.
        path: what errors call it.

    Raises:
        UsageError: it is something else.
    """

    def __init__(self, found: Any, path: str) -> None:
        super().__init__()
        self.reduction = "mean"
        self.path = path
        self.ignore_index = getattr(found, "ignore_index", None)
        self._takes_logits = (getattr(found, "__module__", None) or "").startswith("torch.nn")
        if hasattr(found, "reduction"):
            self.losses: Any = copy.deepcopy(found)
            self.losses.reduction = "none"
        elif not callable(found) or isinstance(found, nn.Module):
            raise UsageError(f"{path} has no reduction. {_REMEDY}")
        elif "reduction" in inspect.signature(found).parameters:
            self.losses = functools.partial(found, reduction="none")
        else:
            self.losses = found

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean, the sum, or ``[B]`` losses, as ``reduction`` says.

        Raises:
            UsageError: there is not a row of losses for each example.
        """
        if self._takes_logits:
            outputs = logits_in(outputs)
        losses = self.losses(outputs, targets)
        if not isinstance(losses, Tensor) or not losses.dim():
            made = "a scalar" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise UsageError(f"{self.path} reduces a batch to {made}. {_REMEDY}")
        sizes = [own.numel() for own in (outputs, targets) if isinstance(own, Tensor)]
        if len(sizes) == 2 and losses.numel() > max(sizes):
            raise UsageError(
                f"{self.path} broadcasts outputs of shape {tuple(outputs.shape)} and targets of "
                f"shape {tuple(targets.shape)}, so an example's loss depends on others'. Give both "
                "one shape"
            )
        if isinstance(targets, Tensor) and len(losses) != len(targets):
            raise UsageError(
                f"{self.path} makes {len(losses)} losses of {len(targets)} examples. {_REMEDY}"
            )
        counted = None
        if self.ignore_index is not None and targets.shape == losses.shape:
            counted = targets != self.ignore_index
        losses = mean_of_counted(losses, counted)
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()
