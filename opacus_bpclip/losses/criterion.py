"""``make_private(criterion=...)``: a loss that keeps the batch's size out of the backward pass.

The mean over ``n`` examples divides every gradient by ``n``, which is private, and rounds the
quotient. So the last bits of an example's gradient depend on the other examples, and an
ill-conditioned backward pass magnifies them. A criterion that `make_private` returns has the value
of the mean, but the gradient of the sum, which does not depend on ``n``. Proof:
``docs/guarantee.md``, "A mean loss".
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opacus_bpclip.losses.losses import mean_of_counted
from opacus_bpclip.losses.trials import Trials
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.rows import rows_are_coupled
from opacus_bpclip.rules.base import zero_rows
from opacus_bpclip.rules.first_order import first_order
from opacus_bpclip.rules.precision import wide

_PER_EXAMPLE = (
    "Pass a criterion that returns [B, ...] with reduction='none', one row for each example "
    "(opacus_bpclip.CrossEntropy, or one of torch's), or leave criterion out."
)


class LossWatch:
    """What the criterion and the guard of one model share about the current batch.

    It holds no reference to the model. A copy starts empty: the next forward pass fills it.
    """

    def __init__(self) -> None:
        self._entered = False
        self._examples: int | None = None
        self.present: Tensor | None = None
        self._task: int | None = None
        self._traced = False

    # The latest backward pass that went through a criterion of any model.
    latest_task: ClassVar[int | None] = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(LossWatch())

    def enter_forward(self, examples: int | None, present: Tensor | None = None) -> None:
        """Begin a forward pass.

        Args:
            examples: the number of rows; ``None`` if a compiled graph hides it.
            present: ``[B]`` bool, which rows are not padding; ``None`` for all.
        """
        self.present = present
        self._entered = True
        self._examples = examples
        self._task = None
        self._traced = False

    def note_traced(self) -> None:
        """Note that the criterion is inside a compiled graph, where no backward pass is seen."""
        self._traced = True

    def note_backward(self) -> None:
        """Note that the current backward pass has gone through the criterion."""
        self._task = LossWatch.latest_task = torch._C._current_graph_task_id()

    @classmethod
    def other_criterion(cls, name: str) -> str | None:
        """Return a message if another model's criterion was used for a model that has none.

        Args:
            name: the name of the parameter that the gradient has arrived at.
        """
        if cls.latest_task != torch._C._current_graph_task_id():
            return None
        return (
            f"{name} got a gradient through a criterion that make_private returned for another "
            "model. It is the gradient of a sum, but this model expects that of a mean. Pass "
            "criterion to make_private for each model, and use the one that it returns."
        )

    def require_examples(self, losses: Tensor) -> None:
        """Check that there is one loss for each example.

        Args:
            losses: ``[B]``.

        Raises:
            ValueError: there is not, or the model has not been called.
        """
        if not self._entered:
            raise ValueError(
                "The model of this criterion has made no forward pass. Use the criterion that "
                "make_private returned together with the model; to copy them, copy both in one "
                "call."
            )
        rows = self._examples
        if rows is None and self.present is not None:
            rows = len(self.present)
        if rows is not None and rows != len(losses):
            raise ValueError(
                f"The criterion got {len(losses)} losses for {rows} examples. Its rows are not the "
                "examples, so the loss is not a mean of one term for each example. Do not flatten "
                "examples and positions together: pass logits as [B, C, ...] with labels [B, ...], "
                "or [B, ..., C] with opacus_bpclip.CrossEntropy(class_axis=-1)."
            )

    def problem(self, name: str) -> str | None:
        """Return a message if a gradient did not come through the criterion.

        Args:
            name: the name of the parameter that the gradient has arrived at.
        """
        if self._traced or self._task == torch._C._current_graph_task_id():
            return None
        return (
            f"{name} got a gradient that did not come through the criterion that make_private "
            "returned. If it is that of a mean, its division by the private batch size would not "
            "be undone. Compute the loss with the returned criterion, or leave criterion out of "
            "make_private."
        )


class BackpropClipCriterion(nn.Module):
    """The criterion that `make_private` returns: the value of the mean, the gradient of the sum.

    An example's loss is the criterion's with ``reduction="none"``, averaged over all axes but the
    first. For ``CrossEntropyLoss`` and ``NLLLoss`` it is averaged over the example's positions that
    are not ignored, without class weights in the divisor; for ``CTCLoss`` it is divided by the
    example's target length. With ``loss_reduction="sum"`` it is summed instead. The value is the
    mean (the sum) over the examples, without padding; 0 for an empty batch.

    Guarantee: the gradients that it sends back do not depend on the number of examples. It belongs
    to the model that it was returned with: the layers of this model treat the gradients as those of
    a sum, and its guard refuses gradients that do not come through this criterion.

    Args:
        criterion: any object with a ``reduction``; it is copied.
        loss_reduction: ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: the criterion has no ``reduction``, another one, or trainable parameters.
    """

    def __init__(self, criterion: Any, *, loss_reduction: str = "mean") -> None:
        super().__init__()
        reduction = getattr(criterion, "reduction", None)
        if reduction is None:
            raise ValueError(
                f"Expected criterion={criterion!r} to have a `reduction`, which is set to 'none' "
                f"for one loss per example. {_PER_EXAMPLE}"
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
                f"{type(criterion).__name__} has trainable parameters, whose gradient would not be "
                "clipped. Make it a part of the model, whose forward then returns [B] losses."
            )
        self.reduction = loss_reduction
        self.criterion = copy.deepcopy(criterion)
        self.criterion.reduction = "none"
        self.watch = LossWatch()
        self._trials = Trials(self.criterion)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, a scalar; the arguments are those of the criterion.

        Raises:
            ValueError: the criterion does not return one row of losses for each example, or a row
                depends on other examples.
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
        """Check that each prediction was compared with its own target only.

        Broadcasting ``[B, 1]`` against ``[B]`` gives ``[B, B]``, more losses than numbers in
        either.
        """
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if tensors and losses.numel() > max(x.numel() for x in tensors):
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            raise ValueError(
                f"{type(self.criterion).__name__} broadcast tensors of the shapes {shapes} to "
                f"losses of shape {tuple(losses.shape)}, so an example's loss depends on other "
                "examples' targets. Give them one shape, for example by target.view_as(output)."
            )

    def _require_own_rows(
        self, size: int, present: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Check, in the calls that are due, that no row of losses depends on another example.

        ``CTCLoss`` is not checked, since its inputs have the batch on different axes.
        """
        if torch.compiler.is_compiling() or size < 2 or isinstance(self.criterion, nn.CTCLoss):
            return
        if present is not None and len(present) != size:
            return  # `LossWatch.require_examples` refuses it, with the reason.
        form = Batch(args, kwargs, size, 0).signature
        if not self._trials.are_due(form):
            return
        batch = Batch(args, kwargs, size, 0, present=present).without_padding()
        if batch.size < 2:
            return
        if rows_are_coupled(_copied(self.criterion), batch.args, batch.kwargs, batch.size):
            raise ValueError(
                f"{type(self.criterion).__name__} couples examples: an example's loss changes when "
                "others are left out of the batch, so one example changes the gradients of others. "
                "Compute each example's loss from that example alone, without means, softmax or "
                "neighbours over the batch."
            )
        self._trials.note(form)

    def _mean(self, losses: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the mean of each example's losses, ``[B]``, as the criterion averages them."""
        if isinstance(self.criterion, nn.CTCLoss):
            lengths = torch.as_tensor(args[3] if len(args) > 3 else kwargs["target_lengths"])
            return losses / lengths.to(losses.device).clamp(min=1)
        counted = None
        if isinstance(self.criterion, (nn.CrossEntropyLoss, nn.NLLLoss)):
            target = args[1] if len(args) > 1 else kwargs["target"]
            if target.shape == losses.shape and not target.is_floating_point():
                counted = target != self.criterion.ignore_index
        return mean_of_counted(losses, counted)


def _copied(criterion: Any) -> Any:
    """Return a copy, so that a trial leaves nothing behind; the same object if it has no copy.

    Parameters, which may be large, are shared: a trial trains nothing.
    """
    parameters = criterion.parameters() if isinstance(criterion, nn.Module) else ()
    try:
        return copy.deepcopy(criterion, {id(own): own for own in parameters})
    except Exception:  # a loss with its graph that is kept in an attribute, say
        return criterion


class _Undivided(torch.autograd.Function):
    """The sum over the examples divided by ``divisor``, with the gradient of the sum itself."""

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
