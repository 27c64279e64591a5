"""`FoldViews`: a model of single rows runs over several views of each example.

The views of an example are rows of its own: augmented copies of one picture, for example. Inside
this module they are folded into the batch, example by example. So a layer inside has several rows
of each example, which lie side by side, and its rule treats them as positions of one example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.errors import CoverageError


class FoldViews(nn.Module):
    """Runs a model over all views of each example; in evaluation it is the model alone.

    In training, every tensor among the arguments is ``[B, views, ...]``. The model gets
    ``[B * views, ...]``, and its output ``[B * views, ...]`` becomes ``[B, ..., views]``: the views
    are the last axis, as those of the targets of `AugmentedViews`. So a loss of torch that is a
    mean over all its terms, ``nn.CrossEntropyLoss()`` for example, is the mean over the views, and
    the gradient of an example is the mean of its views' gradients. A sum over all terms adds the
    views up.

    Guarantee: with ``clipping="backprop"`` the views of an example are one example. Together they
    contribute at most ``max_grad_norm`` to a step. Proof: ``docs/guarantee.md``, "Views".

    Args:
        model: a model of single rows, which shares its parameters with this module.
        views: the number of views of an example.

    Raises:
        ValueError: ``views`` is not an integer above zero.

    Examples:
        >>> model = FoldViews(nn.Linear(4, 2), views=3)
        >>> model(torch.zeros(5, 3, 4)).shape
        torch.Size([5, 2, 3])
        >>> model.eval()(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(self, model: nn.Module, views: int) -> None:
        super().__init__()
        self.model = model
        self.views = checked_count(views)
        self.train(model.training)

    @property
    def rows(self) -> int:
        """Return the number of rows of each example that the model inside gets now."""
        return self.views if self.training else 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for all views, ``[B, ..., views]``.

        Raises:
            ValueError: in training, a tensor is not ``[B, views, ...]``, or per-example gradients
                of single rows are being computed.
            TypeError: in training, the model returns something else than a tensor.
        """
        if not self.training:
            return self.model(*args, **kwargs)
        self._refuse_gradients_of_rows()
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not given:
            raise ValueError(
                "FoldViews was called without a tensor: it is unknown what the views are. Pass "
                f"tensors [B, {self.views}, ...] as arguments of their own."
            )
        args = tuple(map(self._folded, args))
        output = self.model(*args, **{name: self._folded(x) for name, x in kwargs.items()})
        if not isinstance(output, Tensor):
            raise TypeError(
                f"The model in FoldViews returns a {type(output).__name__}, and not a tensor "
                "[B * views, ...]. Wrap it in a module whose forward returns the logits alone."
            )
        return output.unflatten(0, (given[0].shape[0], self.views)).movedim(1, -1)

    def _folded(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dim() < 2 or x.shape[1] != self.views:
            raise ValueError(
                f"FoldViews got a tensor of shape {tuple(x.shape)} in training, and needs "
                f"[B, {self.views}, ...], {self.views} views of each example. Make the items with "
                f"opacus_bpclip.AugmentedViews(dataset, transform, views={self.views}). To "
                "evaluate on single rows, call eval() first."
            )
        return x.flatten(0, 1)

    def _refuse_gradients_of_rows(self) -> None:
        """Refuse Opacus's own modes, in which each view would count as an example."""
        if torch.compiler.is_compiling():
            return
        if any(hasattr(parameter, "grad_sample") for parameter in self.parameters()):
            raise ValueError(
                "FoldViews makes several rows of each example, and Opacus computes and clips the "
                f"gradient of each row by itself: an example would contribute up to {self.views} "
                'times what the noise is made for. Use clipping="backprop", which measures the '
                "views of an example together, or train the model without FoldViews on one row of "
                "each example."
            )


def folds_of(
    model: nn.Module, recurrent: Collection[nn.Module], *, batch_first: bool
) -> Mapping[nn.Module, FoldViews]:
    """Return, for each module inside a `FoldViews`, that `FoldViews`.

    Args:
        model: the model.
        recurrent: the layers of recurrent networks.
        batch_first: whether the batch is the first axis of the model's inputs.

    Raises:
        CoverageError: one `FoldViews` is inside another, or two of them share a module; it is not
            known which rows of a layer are one example's.
    """
    found: dict[nn.Module, FoldViews] = {}
    for prefix, fold in model.named_modules():
        if not isinstance(fold, FoldViews):
            continue
        if not batch_first:
            raise CoverageError(
                "FoldViews has the examples on the first axis and the views on the second, but "
                "batch_first=False says that the examples are on the second. Leave batch_first out."
            )
        for name, module in fold.model.named_modules(prefix=f"{prefix}.model".lstrip(".")):
            if isinstance(module, FoldViews) or module in found:
                raise CoverageError(
                    f"{name} ({type(module).__name__}) is inside of two FoldViews, so it is "
                    "unknown how many rows of an example it gets. Use one FoldViews around the "
                    "model, with all views of an example."
                )
            if module in recurrent:
                raise CoverageError(
                    f"{name} is a part of a recurrent network inside FoldViews: the rows of its "
                    "time steps are sorted and padded by the network, and it is not known which "
                    "of them are one example's. Leave FoldViews out, and train on one view of "
                    "each example."
                )
            found[module] = fold
    return found


def checked_count(views: object) -> int:
    """Return a number of views.

    Raises:
        ValueError: it is not an integer above zero.
    """
    if not isinstance(views, int) or isinstance(views, bool) or views < 1:
        raise ValueError(
            f"Expected views={views!r} to be an integer >= 1, the number of views of each example."
        )
    return views
