"""When the search for coupled examples runs: before training, on the first batch, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.probe.forms import made_up_batches
from tests.budgets import layerwise
from tests.helpers import CLASSES, FEATURES, batch, loss_of, make_private
from tests.probing import Middle, OnlyReal


class Secret(TensorDataset):
    """Examples whose values nobody may compute with before training."""


def test_made_up_examples_hold_none_of_the_values() -> None:
    seen: list[Tensor] = []
    model = Middle(lambda h: h)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    secret = Secret(torch.full((32, FEATURES), 12345.0), torch.zeros(32, dtype=torch.long))
    make_private(model, data=secret)
    assert seen
    assert all(x.shape[1:] == (FEATURES,) and not (x == 12345.0).any() for x in seen)


RUNS: list[int] = []  # outside the model, where the search puts everything back


class TwoInputs(nn.Module):
    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.layer, self.coupled = nn.Linear(FEATURES, CLASSES), coupled

    def forward(self, x: Tensor, *, weight: Tensor) -> Tensor:
        RUNS.append(len(x))
        y = self.layer(x) * weight[:, None]
        return y - self.coupled * y.mean(dim=0)


def test_what_the_loader_does_not_show_is_searched_on_the_first_batch() -> None:
    private = make_private(TwoInputs(coupled=True))
    with pytest.raises(PrivacyViolationError, match=r"^\(root\) \(TwoInputs\) couples examples"):
        private.model(batch()[0], weight=torch.ones(6))


def test_the_first_batch_is_searched_once() -> None:
    private = make_private(TwoInputs(coupled=False))
    runs = []
    for size in (0, 6, 5, 1):
        RUNS.clear()
        private.optimizer.zero_grad()
        private.model(batch(size)[0], weight=torch.ones(size)).mean().backward()
        private.optimizer.step()
        runs.append(len(RUNS))
    assert runs[0] > 1
    assert runs[1:] == [1, 1, 1]


@pytest.mark.parametrize("coupled", [True, False])
def test_examples_that_cannot_be_made_up_are_searched_as_they_are(coupled: bool) -> None:
    ids = torch.arange(100, 108)
    private = make_private(OnlyReal(coupled), data=TensorDataset(ids, ids))
    # One example has no companions: the next batch is looked at.
    private.model(ids[:1])
    if coupled:
        with pytest.raises(PrivacyViolationError, match=r"^\(root\) \(OnlyReal\) couples examples"):
            private.model(ids)
    else:
        private.model(ids).mean().backward()
        private.optimizer.step()
        assert private.steps == 1


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from zip(*batch(), strict=True)


def test_a_stream_shows_no_example_and_waits_for_the_first_batch() -> None:
    assert not list(made_up_batches(DataLoader(Stream(), batch_size=2), nn.Linear(1, 1)))


def test_the_promise_that_nothing_is_coupled_turns_the_search_off() -> None:
    private = make_private(Middle(lambda h: h - h.mean(dim=0)), backprop=layerwise(probe=False))
    loss_of(private.model, *batch()).backward()
    with pytest.raises(ValueError, match=r"^Expected probe=1 to be True or False\.$"):
        layerwise(probe=1)
