"""A batch that is filled up gives the sum of its examples, to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opacus_bpclip import BackpropClipping
from tests.budgets import layerwise
from tests.helpers import flat
from tests.padding.models import KINDS
from tests.padding.training import check_alike, private_of, train, with_criterion

BUDGETS = {
    "joint": BackpropClipping(),
    "layerwise": layerwise(bound="exact", max_input_norm=None, uses="auto"),
}


@pytest.mark.parametrize("rows", [5, 32], ids=["parts", "whole"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_adds_nothing_whatever_the_model(kind: str, budget: str, rows: int) -> None:
    found, expected = (
        train(private_of(kind, size, clipping=BUDGETS[budget])) for size in (rows, None)
    )
    check_alike(found, expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bound", ["product", "weighted", "exact"])
@pytest.mark.parametrize("allocation", ["joint", "equal"])
def test_padding_adds_nothing_whatever_the_bound(
    allocation: str, bound: str, normalize: bool
) -> None:
    clipping = BackpropClipping(
        allocation=allocation, bound=bound, normalize=normalize, max_input_norm=1.0
    )
    found, expected = (train(private_of("sequences", n, clipping=clipping)) for n in (5, None))
    check_alike(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["perceptron", "attention"])
def test_a_criterion_has_the_value_of_the_examples_alone(kind: str, reduction: str) -> None:
    values, sums = {}, {}
    for rows in (32, None):
        model, optimizer, criterion, loader = with_criterion(kind, rows, reduction)
        optimizer.keep_summed_grad = True
        values[rows], sums[rows] = [], []
        for *x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(*x), y)
            loss.backward()
            optimizer.step()
            values[rows].append(float(loss.detach()))
            sums[rows].append(flat(p.summed_grad for p in optimizer.params))
    # Rows that are not numbers among them: attention to nothing.
    assert values[32] == pytest.approx(values[None])
    check_alike(sums[32], sums[None])


def test_a_plain_loss_that_is_a_sum_gives_the_same() -> None:
    loss = nn.CrossEntropyLoss(reduction="sum")
    found, expected = (
        train(private_of(rows=rows, loss_reduction="sum"), loss=loss) for rows in (8, None)
    )
    check_alike(found, expected)


def test_an_example_of_zeros_is_taken_for_padding() -> None:
    data = [(torch.zeros(4), 0)] * 24
    for total in train(private_of(data=data)):
        assert not total.any()
