"""Killers of mutants of the search: models that couple examples, or share a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.probing import found, made_up


class _Losing(nn.Module):
    def __init__(self, weight: list[float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.weight = nn.Linear(4, 3), weight

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.head(x).movedim(-1, 1)
        weight = None if self.weight is None else torch.tensor(self.weight, dtype=y.dtype)
        return F.cross_entropy(y, labels, weight=weight)


def mean_over_labels_that_count() -> None:
    """A model that returns the mean loss of its labels, some of which may be ignored."""
    batch = made_up(torch.zeros(4, 8, 4), torch.zeros(4, 8, dtype=torch.long))
    assert found(_Losing(), batch), "the private number of labels was not found"


def mean_weighted_by_class() -> None:
    """A model that returns a mean loss weighted by class."""
    batch = made_up(torch.zeros(4, 4), torch.zeros(4, dtype=torch.long))
    assert found(_Losing([1.0, 5.0, 1.0]), batch), "the private sum of weights was not found"


def module_under_two_names() -> None:
    """A model that has one layer under two names."""
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    model["second"] = model["first"]
    model.forward = lambda x: model["second"](model["first"](x))
    before = dict(model.named_parameters(remove_duplicate=False))
    assert found(model) is None
    after = dict(model.named_parameters(remove_duplicate=False))
    same = before.keys() == after.keys() and all(after[n] is own for n, own in before.items())
    assert same, "the model was left changed"
