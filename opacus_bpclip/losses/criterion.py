"""``make_private(criterion=...)``: a loss that keeps the batch's size out of the backward pass.

The mean over ``n`` examples divides every gradient by ``n``, which is private, and rounds the
quotient. What comes back is the same example's gradient with other last bits in every company, and
an ill-conditioned backward pass makes much of those. A criterion that `make_private` knows has the
mean for its value, and the gradient of the sum: ``n`` never enters. Proof: ``docs/guarantee.md``,
"A mean loss".
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opacus_bpclip.losses.losses import mean_of_counted
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.rows import rows_are_coupled
from opacus_bpclip.rules.base import zero_rows
from opacus_bpclip.rules.first_order import first_order
from opacus_bpclip.rules.precision import wide

_PER_EXAMPLE = (
    "Pass a criterion with a `reduction` that gives [B, ...] with reduction='none', one row for "
    "each example (opacus_bpclip.CrossEntropy, torch's own), or leave criterion out."
)


class LossWatch:
    """What the criterion and the guard of one model know of the batch at hand.

    Holds no model. A copy knows nothing: where the model is copied with it, the next
    forward pass tells it.
    """

    def __init__(self) -> None:
        self._entered = False
        self._examples: int | None = None
        self.present: Tensor | None = None
        self._task: int | None = None
        self._traced = False

    # In which backward pass a criterion of any model was last.
    latest_task: ClassVar[int | None] = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(LossWatch())

    def enter_forward(self, examples: int | None, present: Tensor | None = None) -> None:
        """Begin a forward pass.

        Args:
            examples: over how many rows; ``None`` where a compiled graph hides that.
            present: ``[B]`` bool, which rows are not padding; ``None`` for all.
        """
        self.present = present
        self._entered = True
        self._examples = examples
        self._task = None
        self._traced = False

    def note_traced(self) -> None:
        """Note that the criterion is part of a compiled graph: its backward pass is not seen."""
        self._traced = True

    def note_backward(self) -> None:
        """Note that a backward pass has come through the criterion."""
        self._task = LossWatch.latest_task = torch._C._current_graph_task_id()

    @classmethod
    def foreign(cls, name: str) -> str | None:
        """Say that a mean's gradient is expected, and a criterion has sent a sum's.

        Args:
            name: of the parameter that it arrives at.
        """
        if cls.latest_task != torch._C._current_graph_task_id():
            return None
        return (
            f"{name} got a gradient through a criterion that make_private returned for another "
            "model: it is a sum's, and would be taken for a mean's. Pass criterion to make_private "
            "for each model, and use the one that came with it."
        )

    def require_examples(self, losses: Tensor) -> None:
        """Check that each loss is one example's.

        Args:
            losses: ``[B]``.

        Raises:
            ValueError: they are not.
        """
        if not self._entered:
            raise ValueError(
                "This criterion has seen no forward pass of its model. Use the one that "
                "make_private returned with the model, or that was copied together with it."
            )
        rows = self._examples
        if rows is None and self.present is not None:
            rows = len(self.present)
        if rows is not None and rows != len(losses):
            raise ValueError(
                f"The criterion got {len(losses)} losses for {rows} examples: its rows "
                "are not the examples, and the mean over rows is not one term for each example. "
                "Do not flatten examples and positions together: pass logits as [B, C, ...] with "
                "labels [B, ...], or [B, ..., C] with opacus_bpclip.CrossEntropy(class_axis=-1)."
            )

    def problem(self, name: str) -> str | None:
        """Say that the gradient that arrives at a parameter is not the criterion's.

        Args:
            name: of the parameter.
        """
        if self._traced or self._task == torch._C._current_graph_task_id():
            return None
        return (
            f"{name} got a gradient that did not come through the criterion that make_private "
            "returned: a mean's division by the batch's size, which is private, would not be "
            "undone. Compute the loss with the returned criterion, or leave criterion out of "
            "make_private."
        )


class BackpropClipCriterion(nn.Module):
    """A criterion as `make_private` returns it: the value of the mean, the gradient of the sum.

    Each example's loss is the criterion's with ``reduction="none"``, averaged over all axes but the
    first; for ``CrossEntropyLoss`` and ``NLLLoss``, over the example's positions that are not
    ignored, without the class weights in the divisor; for ``CTCLoss``, divided by the example's
    target length. With ``loss_reduction="sum"`` it is their sum. The value is the mean (the sum)
    over the examples, without the rows that a batch is filled up with; 0 for an empty batch.

    Guarantee: no gradient that leaves it depends on how many examples there are. It belongs to the
    model that it was returned with, whose layers take the gradients for those of a sum, and whose
    guard refuses gradients that come from elsewhere.

    Args:
        criterion: any object with a ``reduction``; it is copied.
        loss_reduction: ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: the criterion has another reduction, none, or parameters to train.
    """

    def __init__(self, criterion: Any, *, loss_reduction: str = "mean") -> None:
        super().__init__()
        reduction = getattr(criterion, "reduction", None)
        if reduction is None:
            raise ValueError(
                f"Expected criterion={criterion!r} to have a `reduction`, so that it can be asked "
                f"for each example's loss. {_PER_EXAMPLE}"
            )
        if reduction != loss_reduction:
            raise ValueError(
                f"Expected the criterion's reduction={reduction!r} to be "
                f"loss_reduction={loss_reduction!r}. {_PER_EXAMPLE}"
            )
        if isinstance(criterion, nn.Module) and any(
            p.requires_grad for p in criterion.parameters()
        ):
            raise ValueError(
                f"{type(criterion).__name__} has parameters of its own, and nothing clips their "
                "gradient. Make it a part of the model, whose forward then returns [B] losses."
            )
        self.reduction = loss_reduction
        self.criterion = copy.deepcopy(criterion)
        self.criterion.reduction = "none"
        self.watch = LossWatch()
        self._tried: set[object] = set()  # the forms of call that were searched

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, a scalar; the arguments are the criterion's own.

        Raises:
            ValueError: what the criterion returns is not one row of losses for each example.
        """
        losses = self.criterion(*args, **kwargs)
        if not isinstance(losses, Tensor) or not losses.dim():
            shape = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else "no tensor"
            raise ValueError(
                f"{type(self.criterion).__name__} returned {shape} with reduction='none' instead "
                f"of [B, ...], one row of losses for each example. {_PER_EXAMPLE}"
            )
        self._require_no_broadcast(losses, (*args, *kwargs.values()))
        present = self.watch.present if losses.requires_grad else None
        self._require_own_rows(len(losses), present, args, kwargs)
        mean = self.reduction == "mean"
        if mean:
            losses = self._mean(losses, args, kwargs)
        elif losses.dim() > 1:
            losses = losses.flatten(1).sum(dim=1)
        watch: LossWatch | None = self.watch
        if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
            self.watch.note_traced()
            watch = None
        elif losses.requires_grad:
            self.watch.require_examples(losses)
        divisor: int | Tensor = 1
        if mean:
            divisor = max(len(losses), 1) if present is None else present.sum().clamp(min=1)
        total: Tensor = _Undivided.apply(watch, losses, present, divisor)
        return total

    def _require_no_broadcast(self, losses: Tensor, arguments: Iterable[Any]) -> None:
        """Check that predictions were not broadcast against everybody's targets.

        ``[B, 1]`` and ``[B]`` give ``[B, B]``: more losses than either has numbers.
        """
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if tensors and losses.numel() > max(x.numel() for x in tensors):
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            raise ValueError(
                f"{type(self.criterion).__name__} broadcast tensors of the shapes {shapes} to "
                f"losses of shape {tuple(losses.shape)}: an example would meet the targets of "
                "others. Give them one shape, for example by target.view_as(output)."
            )

    def _require_own_rows(
        self, size: int, present: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Check, once for each form of call, that no row of losses depends on another example.

        Left out is ``CTCLoss``, whose inputs have the batch on different axes.
        """
        if torch.compiler.is_compiling() or size < 2 or isinstance(self.criterion, nn.CTCLoss):
            return
        if present is not None and len(present) != size:
            return  # Refused next, with the reason.
        form = Batch(args, kwargs, size, 0).signature
        if form in self._tried:
            return
        batch = Batch(args, kwargs, size, 0, present=present).without_padding()
        if batch.size < 2:
            return
        if rows_are_coupled(self.criterion, batch.args, batch.kwargs, batch.size):
            raise ValueError(
                f"{type(self.criterion).__name__} couples examples: an example's loss changes when "
                "others are left out of the batch, so one example would move the gradients of "
                "others. Compute each example's loss from that example alone: no mean, softmax or "
                "neighbours over the batch."
            )
        self._tried.add(form)

    def _mean(self, losses: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the mean of each example's losses, ``[B]``, in the criterion's sense."""
        if isinstance(self.criterion, nn.CTCLoss):
            lengths = torch.as_tensor(args[3] if len(args) > 3 else kwargs["target_lengths"])
            return losses / lengths.to(losses.device).clamp(min=1)
        counted = None
        if isinstance(self.criterion, (nn.CrossEntropyLoss, nn.NLLLoss)):
            target = args[1] if len(args) > 1 else kwargs["target"]
            if target.shape == losses.shape and not target.is_floating_point():
                counted = target != self.criterion.ignore_index
        return mean_of_counted(losses, counted)


class _Undivided(torch.autograd.Function):
    """The quotient of a sum over the examples, and the gradient of the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        watch: LossWatch | None,
        losses: Tensor,
        present: Tensor | None,
        divisor: int | Tensor,
    ) -> Tensor:
        ctx.watch, ctx.shape, ctx.dtype = watch, losses.shape, losses.dtype
        return zero_rows(wide(losses), present).sum() / divisor

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None, None]:
        if ctx.watch is not None:
            ctx.watch.note_backward()
        return None, g.to(ctx.dtype).expand(ctx.shape), None, None
