"""Items that are padded to the longest of a batch must have outputs of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import BackpropClipping, CoverageError, PrivacyEngine
from opacus_bpclip.probe import padding
from tests.padded_texts import (
    Attending,
    Causal,
    Dropped,
    Last,
    MaskedMean,
    Maximum,
    Mean,
    OptionalMask,
    Packed,
    SequenceFirst,
    Tags,
    Text,
    from_lists,
    masked_at_random,
    on_the_left,
    padded,
    sorted_by_length,
    texts,
    to_a_public_length,
    with_lengths,
    with_mask,
)

REFUSAL = (
    "The data loader's collate_fn pads items to the longest one of a batch, and what the model "
    "makes of an item depends on how far it is padded. A long example would change the "
    "contributions of all others in its batch, and the noise is not made for that. Pad all items "
    "to one public length, or leave padding out in the model: mask it, take the mean or the last "
    "output over an item's own positions, pack sequences. If you are certain that no example's "
    "output depends on another's, set BackpropClipping(probe=False)."
)


def private(
    model: nn.Module,
    collate: Callable[[list[Any]], Any] = padded,
    items: Any = None,
    *,
    backprop: BackpropClipping | None = None,
    **options: Any,
) -> Any:
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(items or texts(), batch_size=8, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        backprop=backprop,
        **options,
    )


@pytest.mark.parametrize("collate", [padded, sorted_by_length, on_the_left])
@pytest.mark.parametrize("make", [Mean, Dropped, Last, Maximum, Tags])
def test_a_model_that_sees_the_padding_is_refused(make: type[Text], collate: Any) -> None:
    # 46 times the claim for the mean, of 200 texts of 5 words and one of 60.
    with pytest.raises(CoverageError) as refusal:
        private(make(), collate)
    assert str(refusal.value) == REFUSAL


def test_items_of_one_length_do_not_hide_it() -> None:
    with pytest.raises(CoverageError, match="pads items to the longest"):
        private(Mean(), items=texts((5,)))


def test_the_sequence_may_be_the_first_axis() -> None:
    def collate(items: list[Any]) -> Any:
        words, labels = padded(items)
        return words.T, labels

    with pytest.raises(CoverageError, match="pads items to the longest"):
        private(SequenceFirst(), collate, batch_first=False)


@pytest.mark.parametrize("items", [texts(), texts((5,))], ids=["lengths", "one length"])
@pytest.mark.parametrize(
    ("make", "collate"),
    [
        (MaskedMean, padded),
        (MaskedMean, sorted_by_length),
        (MaskedMean, on_the_left),
        (Attending, padded),
        (Packed, with_lengths),
        (Causal, padded),
        (Mean, to_a_public_length),
    ],
)
def test_a_model_that_leaves_padding_out_trains(
    make: type[Text], collate: Any, items: list[Any]
) -> None:
    model = make()
    wrapped, optimizer, criterion, loader = private(model, collate, items)
    before = model.head.weight.detach().clone()
    for *inputs, labels in loader:
        optimizer.zero_grad()
        outputs = wrapped(*inputs)
        targets = labels if outputs.dim() == 2 else labels[:, None].expand(outputs.shape[:2])
        criterion(outputs if outputs.dim() == 2 else outputs.transpose(1, 2), targets).backward()
        optimizer.step()
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize(
    "items",
    [
        [{"words": [1, 2, 3], "label": torch.tensor([0])}] * 8,
        [{"words": np.arange(1, 4), "label": torch.tensor([0])}] * 8,
    ],
    ids=["lists", "arrays"],
)
def test_items_of_one_length_may_be_lists_or_arrays(items: list[Any]) -> None:
    with pytest.raises(CoverageError, match="pads items to the longest"):
        private(Mean(), from_lists, items)


def test_a_mask_that_may_be_left_out_is_taken_to_be_passed() -> None:
    private(OptionalMask(), with_mask)
    with pytest.raises(CoverageError, match="pads items to the longest"):
        private(OptionalMask(), lambda items: padded(items)[:1])


class WithLoss(Mean):
    """Returns its loss where it gets labels, and nothing can be said of that."""

    def forward(self, words: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(words)
        return logits if labels is None else F.cross_entropy(logits, labels)


def test_a_loss_that_the_model_returns_does_not_hide_it() -> None:
    with pytest.raises(CoverageError, match="pads items to the longest"):
        private(WithLoss())


@pytest.mark.parametrize("shape", [(3,), (3, 7), (7, 3, 4), (7, 4, 4)])
def test_of_some_outputs_nothing_is_said(shape: tuple[int, ...]) -> None:
    assert padding._differ(torch.ones(shape), torch.zeros(7, 5, 5)[: shape[0]], 0.0) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_any_axis_of_the_right_size_may_be_the_batchs(axis: int) -> None:
    alone = torch.arange(7.0).repeat(7, 1)
    beside = torch.cat([alone[:6], torch.ones(1, 7)])
    assert not padding._differ(alone.movedim(0, axis), beside.movedim(0, axis), 0.0)
    assert padding._differ(alone.movedim(0, axis), 2 * beside.movedim(0, axis), 0.0)


def test_on_an_accelerator_no_long_item_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "device_of", lambda model: torch.device("cuda"))
    private(Mean(), items=texts((5,)))
    with pytest.raises(CoverageError, match="pads items to the longest"):
        private(Mean())


def test_nothing_is_said_of_masks_that_are_drawn_in_the_collate_function() -> None:
    private(MaskedMean(), masked_at_random)


def test_the_search_may_be_left_out() -> None:
    private(Mean(), backprop=BackpropClipping(probe=False))
