"""`AugmentedViews`: a data set whose items are several views of one item of another data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from opacus_bpclip.model.views import checked_count
from opacus_bpclip.probe.randomness import repeatable


class AugmentedViews(Dataset[tuple[Tensor, ...]]):
    """Several augmented views of each item, for a model in `FoldViews`.

    An item is ``(inputs, targets)``: ``inputs``, ``[views, ...]``, are the transform of the item's
    input, made ``views`` times; ``targets``, ``[..., views]``, repeat the item's target. Further
    parts of an item are treated as the target. So a batch of a loader has inputs
    ``[B, views, ...]`` and targets ``[B, ..., views]``.

    Guarantee: one item of the data set is one item of the loader, whatever ``views`` is, and its
    views depend on that item alone. Each item is read, and its views are made, with random numbers
    of its own (torch's on the CPU, NumPy's and Python's global generators), which depend on the
    seed, on the item's index and on how often this worker process has read it, and not on the other
    items of the batch. A transform that keeps something of an item for later ones would break this.

    Source: augmentation multiplicity, De et al. 2022 (arXiv 2204.13650).

    Args:
        dataset: a data set of ``(input, target)`` with a length and items by index.
        transform: makes a view, a tensor, of an input: a transform of torchvision, for example. All
            views of an item must have one shape.
        views: the number of views of an item.
        seed: of the random numbers; ``None`` draws one from torch's global generator.

    Raises:
        ValueError: ``views`` is not an integer above zero.

    Examples:
        >>> pictures = torch.utils.data.TensorDataset(torch.zeros(6, 3, 8, 8), torch.arange(6))
        >>> data = AugmentedViews(pictures, lambda x: x + torch.randn_like(x), views=4)
        >>> [part.shape for part in data[5]]
        [torch.Size([4, 3, 8, 8]), torch.Size([4])]
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Tensor],
        views: int,
        *,
        seed: int | None = None,
    ) -> None:
        self.dataset, self.transform, self.views = dataset, transform, checked_count(views)
        self.seed = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
        self._read: dict[int, int] = {}

    def __len__(self) -> int:
        """Return the number of items, not of views."""
        return len(self.dataset)

    # Without `__getitems__`: an item is made by itself, also where `dataset` reads many at once.
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return the views of an item, and its target for each.

        Raises:
            TypeError: the item is not ``(input, target)``, the transform returns no tensor, or the
                target is neither a tensor nor a number.
            ValueError: the views have different shapes.
        """
        with repeatable(torch.device("cpu"), self._own_seed(index)):
            item = self.dataset[index]
            if not isinstance(item, (tuple, list)) or len(item) < 2:
                raise TypeError(
                    f"AugmentedViews needs items (input, target), and got a {type(item).__name__}. "
                    "Wrap the data set in one whose items are such tuples."
                )
            made = [self.transform(item[0]) for _ in range(self.views)]
        return _stacked(made), *(self._repeated(target) for target in item[1:])

    def _own_seed(self, index: int) -> int:
        """Return a seed for this reading of an item, from 0 to 2 ** 32 - 1."""
        times = self._read[index] = self._read.get(index, -1) + 1
        worker = get_worker_info()
        # A worker's seed is new in each epoch, in which the counts of its copy may start anew.
        what = (self.seed, None if worker is None else worker.seed, int(index), times)
        return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "big")

    def _repeated(self, target: Any) -> Tensor:
        try:
            one = torch.as_tensor(target)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"AugmentedViews repeats an item's target for each view, which needs a tensor or a "
                f"number, and got a {type(target).__name__}. Make such targets in the data set."
            ) from None
        return one.unsqueeze(-1).repeat(*(1,) * one.dim(), self.views)


def _stacked(views: Sequence[Any]) -> Tensor:
    for view in views:
        if not isinstance(view, Tensor):
            raise TypeError(
                f"The transform of AugmentedViews returns a {type(view).__name__}, and not a "
                "tensor. Let it end with torchvision.transforms.ToTensor() or a function that "
                "makes a tensor."
            )
    shapes = list(dict.fromkeys(tuple(view.shape) for view in views))
    if len(shapes) > 1:
        raise ValueError(
            f"The transform of AugmentedViews makes views of the shapes {shapes[0]} and "
            f"{shapes[1]}. Let it crop or resize them to one shape."
        )
    return torch.stack(list(views))
