"""Models, calls and ways to train in which several views of an example would not be bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opacus
import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, CoverageError, FoldViews, PrivacyEngine
from tests.helpers import SEARCHES_FOR_NOISE
from tests.views.training import CLASSES, VIEWS, cnn, data, private


class Interleaved(nn.Module):
    """Has the first views of all examples before the second ones in its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(36, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x.flatten(1))).unflatten(0, (-1, VIEWS))
        y = self.second(y.transpose(0, 1).flatten(0, 1))
        return y.unflatten(0, (VIEWS, -1)).transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize("allocation", ["joint", "equal"])
def test_views_that_do_not_stay_side_by_side_are_refused(allocation: str) -> None:
    with pytest.raises(CoverageError) as refusal:
        private(
            FoldViews(Interleaved(), VIEWS),
            data(),
            backprop=BackpropClipping(allocation=allocation),
        )
    assert str(refusal.value) == (
        "model.second (Linear): in FoldViews, each 3 rows side by side must be the views of one "
        "example, which are measured together. Here the rows are in another order: an example "
        "would contribute up to 3 times what the noise is made for. Keep the batch's order inside "
        "the model."
    )


NOT_VIEWS = (
    r"FoldViews got a tensor of shape \(2, 1, 6, 6\) in training, and needs \[B, 3, ...\], 3 views "
    r"of each example. Make the items with opacus_bpclip.AugmentedViews\(dataset, transform, "
    r"views=3\). To evaluate on single rows, call eval\(\) first."
)


def test_calls_that_are_not_of_views_are_refused() -> None:
    fold = FoldViews(cnn(), VIEWS)
    with pytest.raises(ValueError, match=NOT_VIEWS):
        fold(torch.zeros(2, 1, 6, 6))
    with pytest.raises(ValueError, match="FoldViews was called without a tensor"):
        fold([torch.zeros(2, 3, 1, 6, 6)])
    with pytest.raises(TypeError, match="The model in FoldViews returns a tuple, and not a tensor"):
        FoldViews(nn.LSTM(4, 2, batch_first=True), 2)(torch.zeros(2, 2, 3, 4))
    for views in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"Expected views={views!r} to be an integer >= 1"):
            FoldViews(cnn(), views)  # type: ignore[arg-type]


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.LSTM(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x[:, 0])[0][:, -1]

    return PrivacyEngine.get_compatible_module(Last(), clipping="backprop")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: FoldViews(nn.Sequential(FoldViews(cnn(), 3)), 3),
            {},
            "model.0 (FoldViews) is inside of two FoldViews",
        ),
        (
            lambda: FoldViews(cnn(), VIEWS),
            {"batch_first": False},
            "FoldViews has the examples on the first axis and the views on the second, but "
            "batch_first=False says that the examples are on the second. Leave batch_first out.",
        ),
        (
            lambda: FoldViews(recurrent(), VIEWS),
            {},
            "is a part of a recurrent network inside FoldViews",
        ),
    ],
    ids=["two folds", "batch second", "recurrent"],
)
def test_models_that_no_rule_bounds_are_refused(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CoverageError) as refusal:
        private(make(), data(), **options)
    assert message in str(refusal.value)


@SEARCHES_FOR_NOISE
@pytest.mark.parametrize("engine", [PrivacyEngine, opacus.PrivacyEngine])
@pytest.mark.parametrize(
    "options",
    [
        {"grad_sample_mode": "hooks"},
        {"grad_sample_mode": "functorch"},
        {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss()},
    ],
    ids=["hooks", "functorch", "ghost"],
)
def test_opacus_own_modes_are_refused_before_they_count_views_as_examples(
    options: dict[str, Any], engine: type[opacus.PrivacyEngine]
) -> None:
    fold = FoldViews(cnn(), VIEWS)
    model, _, *_, loader = private(fold, data(), clipping="flat", engine=engine(), **options)
    x, _ = next(batch for batch in loader if len(batch[0]))
    with pytest.raises(
        ValueError, match="an example would contribute up to 3 times what the noise"
    ):
        model(x)


def test_a_loss_that_is_no_mean_of_examples_is_refused_by_the_criterion() -> None:
    model, _, criterion, loader = private(
        FoldViews(cnn(), VIEWS), data(), criterion=nn.CrossEntropyLoss()
    )
    x, y = next(batch for batch in loader if len(batch[0]) > 1)
    flat_output = model(x).movedim(-1, 1).flatten(0, 1)
    with pytest.raises(ValueError, match="Its rows are not the examples"):
        criterion(flat_output, y.flatten())
