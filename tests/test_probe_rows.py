"""Layers that meet the examples in another order are found, under a joint budget only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip.probe import find_coupling
from tests.helpers import CLASSES, FEATURES
from tests.order_models import ORDERS, STEPS, Moved, refusal, turned
from tests.probing import made_up

TURNED = pytest.mark.parametrize("order", [pytest.param(o, id=name) for name, o in ORDERS.items()])


@TURNED
def test_rows_in_another_order_are_refused_under_a_joint_budget_only(
    order: Callable[[Tensor], Tensor],
) -> None:
    model = Moved(turned(order))
    text = refusal(model) or ""
    assert text.startswith("second (Linear): its rows are in another order than the examples")
    batch = made_up(torch.zeros(2, FEATURES))
    assert find_coupling(model, batch, loss_reduction="mean") is None


@TURNED
def test_a_copy_in_single_precision_shows_it_as_well(order: Callable[[Tensor], Tensor]) -> None:
    assert "another order" in (refusal(Moved(turned(order), torch.float32)) or "")
    own_order = Moved(lambda x: (torch.arange(len(x)),) * 2, torch.float32)
    assert refusal(own_order) is None


def test_a_branch_in_another_order_is_refused() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.side = nn.Linear(FEATURES, 5), nn.Linear(FEATURES, 5)
            self.head = nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x) + self.side(x.flip(0)).flip(0))

    assert (refusal(Branch()) or "").startswith("side (Linear): its rows")


def test_a_frozen_branch_may_have_any_order() -> None:
    model = Moved(turned(ORDERS["flipped"]))
    model.second.requires_grad_(False)
    assert refusal(model) is None


class Placed(nn.Module):
    """Adds position embeddings, the same for each example, to what is in some order."""

    def __init__(self, flipped: bool) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(STEPS, FEATURES), nn.Linear(FEATURES, CLASSES)
        self.flipped = flipped

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(STEPS).expand(len(x), STEPS))
        h = (x.flip(0) + places).flip(0) if self.flipped else x + places
        return self.head(h.tanh())


@pytest.mark.parametrize("flipped", [False, True])
def test_an_order_shows_where_a_layer_makes_the_same_of_every_example(flipped: bool) -> None:
    text = refusal(Placed(flipped), made_up(torch.zeros(2, STEPS, FEATURES))) or ""
    assert text.startswith("places (Embedding): its rows") is flipped
    assert bool(text) is flipped


@pytest.mark.parametrize("swapped", [False, True])
def test_ids_show_their_order_in_what_is_made_of_them(swapped: bool) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 5), nn.Linear(5, CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.table(ids.flip(0)).flip(0) if swapped else self.table(ids)
            return self.head(h.mean(dim=1))

    text = refusal(Bag(), made_up(torch.zeros(2, STEPS, dtype=torch.long)))
    assert bool(text) is swapped
