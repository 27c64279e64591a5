"""What looks for coupled examples on a real batch looks at its examples, not at the padding."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from tests.padding.models import KINDS, Attention
from tests.padding.training import check_alike, private_of, train, with_criterion


class Picky(Attention):
    """Attention that runs on no made-up words, so that the first batch shows how it is called."""

    coupled = False

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if int(ids.max()) < 2:
            raise ValueError("no such words")
        out = super().forward(ids, mask)
        if self.coupled:
            # Of the examples alone: padding would not show it.
            out = out + out[mask.any(dim=1)].sum()
        return out


@pytest.fixture
def _picky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "picky", KINDS["attention"]._replace(build=Picky))


@pytest.mark.usefixtures("_picky")
def test_rows_that_are_no_numbers_do_not_stop_the_search_on_a_first_batch() -> None:
    found, expected = (train(private_of("picky", rows)) for rows in (32, None))
    check_alike(found, expected)


@pytest.mark.usefixtures("_picky")
def test_a_coupled_model_is_found_behind_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Picky, "coupled", True)
    private = private_of("picky", 32)
    with pytest.raises(PrivacyViolationError, match="couples examples"):
        train(private)


class Coupled(nn.Module):
    """A criterion that adds the mean over the batch to each loss."""

    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(output, target, reduction="none")
        return losses + losses.mean()


def test_a_coupled_criterion_is_found_behind_padding() -> None:
    model, _, criterion, loader = with_criterion("attention", 32, criterion=Coupled())
    *x, y = next(iter(loader))
    output = model(*x)
    assert not output.isfinite().all()
    with pytest.raises(ValueError, match="couples examples"):
        criterion(output, y)
