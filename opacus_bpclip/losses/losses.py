"""Cross-entropy as a mean of one term for each example.

torch's own mean is over positions, and weighted. With ignored positions or class weights, its
divisor is a sum over all examples, so one example changes the gradients of the others by an amount
that nothing bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Reduction = Literal["mean", "sum", "none"]


class CrossEntropy(nn.Module):
    """Cross-entropy in which an example's term depends on that example alone.

    With ``ce`` the cross-entropy of one position, smoothed and weighted by its class as torch does
    with ``reduction="none"``, an example's loss is the mean of ``ce`` over its own positions that
    are not ignored; 0 if there are none. ``[B, C]`` logits have one position. The divisors contain
    neither class weights nor other examples' positions. Without class weights and ignored
    positions, the mean equals torch's ``F.cross_entropy``.

    It has the signature that Hugging Face's ``Trainer(compute_loss_func=...)`` calls.

    Args:
        ignore_index: the label of positions that do not count.
        weight: ``[C]``, the weights of the classes; ``None`` for ones.
        label_smoothing: in [0, 1], as in torch.
        reduction: over the examples: ``"mean"``, ``"sum"``, or ``"none"`` for ``[B]``.
        shift: whether to compare the logits at a position with the label of the next position, as
            in next-token prediction.
        class_axis: the axis of the logits that holds the classes, 1 (``[B, C, ...]``) or -1
            (``[B, ..., C]``). The default is 1, as in torch, and -1 with ``shift``, as in language
            models.

    Raises:
        ValueError: an argument has another value.

    Examples:
        >>> import torch
        >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[1, 2, -100], [4, -100, -100]])
        >>> CrossEntropy(class_axis=-1, reduction="none")(logits, labels)
        tensor([1.6094, 1.6094])
    """

    weight: Tensor | None

    def __init__(
        self,
        ignore_index: int = -100,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        shift: bool = False,
        class_axis: int | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'Expected reduction={reduction!r} to be "mean", "sum" or "none".')
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Expected label_smoothing={label_smoothing!r} to be in [0, 1].")
        if class_axis is None:
            class_axis = -1 if shift else 1
        if class_axis not in (1, -1):
            raise ValueError(f"Expected class_axis={class_axis!r} to be 1 or -1.")
        if weight is not None and weight.dim() != 1:
            raise ValueError(f"Expected weight of shape {tuple(weight.shape)} to have one axis.")
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.shift = shift
        self.class_axis = class_axis

    def forward(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss.

        Args:
            outputs: logits, ``[B, C]``, ``[B, C, ...]`` or ``[B, ..., C]``, or an output that
                contains them: an object with ``.logits``, a mapping with ``"logits"``, or a tuple.
            labels: classes, ``[B]`` or ``[B, ...]``, or probabilities of the logits' shape.
            num_items_in_batch: accepted, since ``Trainer`` passes it, but not used: the number of
                tokens in a batch is private.

        Returns:
            A scalar, or ``[B]`` with ``reduction="none"``. An empty batch gives 0.

        Raises:
            ValueError: the shapes do not match, or their first axis is not the examples.
        """
        losses = self._of_examples(logits_of(outputs), labels)
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total if self.reduction == "sum" else total / max(len(losses), 1)

    def extra_repr(self) -> str:
        """Return the options."""
        names = ("ignore_index", "label_smoothing", "reduction", "shift", "class_axis")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _of_examples(self, logits: Tensor, labels: Tensor) -> Tensor:
        self._require_shapes(logits, labels)
        soft = labels.is_floating_point()
        if self.shift:
            # Shift the labels, which are much smaller than the logits. The last position has none.
            labels = F.pad(labels[:, 1:], (0, 1), value=self.ignore_index)
        rows, targets = logits, labels
        last = logits.dim() > 2 and self.class_axis == -1
        if last:
            rows = logits.flatten(0, -2)
            targets = labels.flatten(0, -2) if soft else labels.flatten()
        losses = F.cross_entropy(
            rows,
            targets,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if last:
            losses = losses.view(logits.shape[:-1])
        return mean_of_counted(losses, None if soft else labels != self.ignore_index)

    def _require_shapes(self, logits: Tensor, labels: Tensor) -> None:
        if logits.dim() < 2:
            raise ValueError(
                f"Expected logits of shape {tuple(logits.shape)} to have an axis of examples and "
                "one of classes: [B, C]."
            )
        positions = list(logits.shape)
        positions.pop(self.class_axis)
        soft = labels.is_floating_point()
        if list(labels.shape) != (list(logits.shape) if soft else positions):
            raise ValueError(
                f"Logits of shape {tuple(logits.shape)} with classes on axis {self.class_axis} do "
                f"not match labels of shape {tuple(labels.shape)}. Each example is one row of "
                "both: pass labels [B, ...] with logits [B, C, ...], or [B, ..., C] with "
                "class_axis=-1. Do not flatten examples and positions together."
            )
        if self.shift and (soft or labels.dim() != 2):
            raise ValueError(
                f"shift=True needs integer labels of shape [B, T], got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )


def mean_of_counted(losses: Tensor, counted: Tensor | None) -> Tensor:
    """Return each example's mean loss over its counted positions, 0 without any. ``[B]``.

    Args:
        losses: ``[B, ...]``, 0 at positions that do not count.
        counted: bool, of the same shape, which positions count; ``None`` for all.
    """
    if losses.dim() == 1:
        return losses
    losses = losses.flatten(1)
    if counted is None:
        return losses.sum(dim=1) / max(losses.shape[1], 1)
    return losses.sum(dim=1) / counted.flatten(1).sum(dim=1).clamp(min=1)


def logits_of(outputs: Any) -> Tensor:
    """Return the logits in a model's output."""
    found = getattr(outputs, "logits", None)
    if isinstance(outputs, Tensor):
        found = outputs
    elif found is None and isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif found is None and isinstance(outputs, (tuple, list)):
        # Skip the model's own loss, a scalar in front of the logits.
        found = next((x for x in outputs if isinstance(x, Tensor) and x.dim() > 1), None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"The model's outputs ({type(outputs).__name__}) contain no logits. Pass a tensor, an "
            'object with .logits, a mapping with "logits", or a tuple that contains them.'
        )
    return found
