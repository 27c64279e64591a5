"""Criteria whose arguments are lists: with an item for each example, or with something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip.probe.rows import rows_are_coupled
from tests.criteria import training
from tests.helpers import CLASSES, batch


class Boxes(nn.Module):
    """The distance of each output to the example's own boxes, by index or by zip.

    Args:
        by: how targets and outputs meet.
        coupled: divide by the number of boxes in the batch.
    """

    reduction = "mean"

    def __init__(self, by: str, *, coupled: bool) -> None:
        super().__init__()
        self.by, self.coupled = by, coupled

    def forward(self, output: Tensor, targets: list[Tensor]) -> Tensor:
        pairs = zip(output, targets, strict=False)
        if self.by == "index":
            pairs = ((output[index], own) for index, own in enumerate(targets))
        losses = torch.stack([(out - own).abs().sum() for out, own in pairs])
        return losses / sum(map(len, targets)) if self.coupled else losses


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("by", ["index", "zip"])
def test_targets_may_be_a_list_with_an_item_for_each_example(by: str, nested: bool) -> None:
    # 21 times the claim, for 200 examples with one box and one with 400.
    class Nested(Boxes):
        def forward(self, output: Tensor, targets: Any) -> Tensor:
            return super().forward(output, targets["boxes"][0])

    x, _ = batch()
    boxes = [torch.randn(1 + number, CLASSES) for number in range(len(x))]
    targets = {"boxes": (boxes,)} if nested else boxes
    kind = Nested if nested else Boxes
    trained = training(kind(by, coupled=False))
    trained.criterion(trained.model(x), targets).backward()
    trained = training(kind(by, coupled=True))
    with pytest.raises(ValueError, match="couples examples"):
        trained.criterion(trained.model(x), targets)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("coupled", [False, True])
def test_a_list_of_as_many_outputs_as_examples_is_told_from_one_of_examples(
    coupled: bool, size: int
) -> None:
    class Scales(nn.Module):
        """Two or four outputs of different sizes, and something else beside them."""

        def forward(self, outputs: Any, target: Tensor) -> Tensor:
            losses = sum(own.square().flatten(1).sum(1) for own in outputs[0])
            losses = losses + (outputs[1]["aux"] - target).square()
            return losses / target.sum() if coupled else losses

    outputs = [torch.randn(size, 1 + scale) for scale in range(size)]
    args = (outputs, {"aux": torch.randn(size)}), torch.rand(size)
    assert rows_are_coupled(Scales(), args, {}, size) == coupled
