"""A criterion is tried for coupled examples again: when a switch changes, and later on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip.losses.criterion import _copied
from tests.criteria import training
from tests.helpers import batch


class Mining(nn.Module):
    """Counts the examples above the batch's mean loss alone, from some epoch on."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(x, y, reduction="none")
        if self.epoch == 0:
            return losses
        return losses * (losses.detach() > losses.detach().mean())


def test_a_criterion_that_couples_examples_from_an_epoch_on_is_refused_there():
    t = training(Mining())
    for _ in range(3):
        t.sum_over(*batch())
        t.optimizer.zero_grad()
    t.criterion.criterion.epoch = 1
    with pytest.raises(ValueError, match="Mining couples examples"):
        t.criterion(t.model(batch()[0]), batch()[1])


class Config:
    mines = False


class Switched(nn.Module):
    """Mines by a switch in an object, in a dictionary, in a buffer, or where nothing shows it."""

    reduction = "mean"

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.config, self.options = where, Config(), {"mines": False}
        self.register_buffer("mines", torch.zeros(()), persistent=False)
        self.hidden = [False]

    def switch(self) -> None:
        self.config.mines = self.where == "object"
        self.options["mines"] = self.where == "dictionary"
        self.mines.fill_(self.where == "buffer")
        self.hidden[0] = self.where == "hidden"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        on = self.config.mines or self.options["mines"] or self.hidden[0] or bool(self.mines)
        losses = F.cross_entropy(x, y, reduction="none")
        return losses * (losses.detach() > losses.detach().mean()) if on else losses


@pytest.mark.parametrize(
    ("where", "calls"), [("object", 1), ("dictionary", 1), ("buffer", 1), ("hidden", 128)]
)
def test_a_criterion_that_couples_examples_later_is_found(where, calls):
    t = training(Switched(where))
    x, y = batch()
    for _ in range(150):
        t.criterion(t.model(x), y)
    copy.deepcopy(t.criterion).criterion.switch()
    t.criterion(t.model(x), y)
    t.criterion.criterion.switch()
    later = (t.criterion(t.model(x), y) for _ in range(calls))
    with pytest.raises(ValueError, match="Switched couples examples"):
        list(later)


def test_a_trial_copies_no_parameters_and_a_copied_criterion_is_tried_by_itself():
    t = training(Switched("object"))
    t.criterion.criterion.teacher = nn.Linear(2, 2)
    x, y = batch()
    t.criterion(t.model(x), y)
    copied = copy.deepcopy(t.criterion)
    copied.watch = t.criterion.watch
    copied.criterion.switch()
    with pytest.raises(ValueError, match="Switched couples examples"):
        copied(t.model(x), y)
    own = next(_copied(t.criterion.criterion).parameters())
    assert own is t.criterion.criterion.teacher.weight


def test_trials_leave_nothing_in_the_criterion_and_a_counter_costs_no_trial_in_each_call():
    class Counting(nn.CrossEntropyLoss):
        tried, count, kept = 0, 0, None

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            Counting.tried += 1
            self.count += 1
            return super().forward(x, y)

    t = training(Counting())
    x, y = batch()
    for _ in range(100):
        t.criterion(t.model(x), y)
    assert t.criterion.criterion.count == 100
    # 32 by the count, later ones at random: each calls the criterion twice, up to six times.
    assert 100 + 33 * 2 <= Counting.tried <= 100 + 50 * 6
    t.criterion.criterion.kept = t.criterion(t.model(x), y)
    t.criterion.criterion.count = -1
    t.criterion(t.model(x), y)


def test_a_criterion_of_ones_own_need_not_be_a_module():
    class Plain:
        reduction = "mean"
        __slots__ = ()

        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(x, y, reduction="none")

    class Settable(Plain):
        pass

    t = training(Settable())
    assert t.criterion(t.model(batch()[0]), batch()[1]).isfinite()
