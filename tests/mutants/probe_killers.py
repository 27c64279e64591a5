"""Killers of mutants of the search: models that couple examples, or share a module."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from opacus_bpclip.probe.prober import Prober
from tests.probing import found, made_up, out_of_sight
from tests.stateful import GradientOnly, Lagged, Seen, Sixth


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


def mean_of_the_batch_before() -> None:
    """A model that subtracts the mean of the batch before, from a buffer that is not persistent."""
    assert found(Lagged()), "the mean of the batch before was not found"


def memory_in_the_gradient() -> None:
    """A model whose gradient, and not its output, depends on the batch before."""
    assert found(GradientOnly()), "the batch before was not found in the gradient"


def number_of_the_batch_before() -> None:
    """A model that divides by the number of examples that it has seen."""
    assert found(Seen(read=True)), "the number of examples was not found"


def average_read_from_the_sixth_pass_on() -> None:
    """A model that begins late to subtract a moving average of its batches."""
    assert found(Sixth()), "the moving average was not found"


def mean_kept_out_of_sight() -> None:
    """A model that subtracts the mean of the batch before, which it keeps in a global variable
    where gradients are made."""
    assert found(out_of_sight("a global")), "the mean of the batch before was not found"


class _Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.words(words).mean(1))


def mean_over_padding() -> None:
    """A model that takes the mean over all positions, and a loader that pads to the longest."""
    texts = [torch.ones(1 + number % 5).long() for number in range(8)]
    loader = DataLoader(texts, batch_size=4, collate_fn=partial(pad_sequence, batch_first=True))
    problem = Prober(_Padded(), loss_reduction="mean").before_training(loader, batch_first=True)
    assert problem, "the padding was not found"


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
