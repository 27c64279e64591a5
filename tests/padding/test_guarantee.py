"""Search for a violation with rows of padding through the real engine; show the bound tight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip import BackpropClipping, CoverageError, PrivacyViolationError
from tests.budgets import layerwise
from tests.checks import (
    check_independence,
    check_sensitivity,
    check_silent,
    joint,
)
from tests.joint.helpers import joint_clippings
from tests.neighbours import REDUCTIONS, neighbours
from tests.padding.padded import HOSTILE, Padded
from tests.padding.training import private_of, train
from tests.sampling import refused
from tests.strategies import (
    BOUNDS,
    MODES,
    clippings,
)


def padded(dtype=torch.float64):
    """Neighbouring batches that are cut and filled up, with hostile padding."""
    return neighbours(
        Padded,
        dtype,
        st.one_of(joint_clippings(), clippings()),
        rows=st.sampled_from([1, 2, 4, 7]),
        fill=st.sampled_from(HOSTILE),
        reduction=REDUCTIONS,
    )


@settings(max_examples=120)
@given(padded())
def test_one_example_moves_the_sum_by_at_most_its_sensitivity(case):
    check_sensitivity(*case)


@settings(max_examples=60)
@given(padded(torch.float32))
def test_the_bound_holds_in_float32_at_every_scale(case):
    check_sensitivity(*case)


@settings(max_examples=60)
@given(padded())
def test_a_batch_sums_what_its_examples_contribute_alone(case):
    check_independence(*case)


@pytest.mark.parametrize("fill", HOSTILE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("bound", "normalize"), MODES)
@pytest.mark.parametrize("allocation", ["joint", "equal"])
def test_one_example_among_padding_reaches_the_bound(allocation, bound, normalize, reduction, fill):
    clipping = BackpropClipping(
        allocation=allocation, bound=bound, normalize=normalize, max_input_norm=3.0
    )
    model = nn.Linear(5, 3)
    trainer = Padded(
        model, (5,), clipping, rows=3, fill=fill, max_grad_norm=2.0, reduction=reduction
    )
    x, target = torch.zeros(1, 5).double(), torch.zeros(1, 3).double()
    x[0, 2] = target[0, 1] = 1e4
    reached = joint(trainer.released(x, target)).norm()
    assert 0.999 * 2.0 <= reached <= 2.0


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("where", ["input", "target"])
def test_an_example_that_is_not_finite_contributes_nothing_among_padding(bound, where):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    trainer = Padded(model, (1, 5, 5), layerwise(bound=bound), rows=3, fill=1e4)
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    target = torch.randn(4, 2, dtype=torch.float64)
    (x if where == "input" else target)[-1].view(-1)[1] = float("nan")
    check_silent(trainer, x, target)


NOT_RECOGNISED = (
    "The model trains on a batch of {rows} rows that are not padding, but the data loader sampled "
    "{items} items. The rows that physical_batch_size adds are zeros, and recognised as such. "
    "Something before the model has changed them (normalisation or noise in the training loop, a "
    "mask or positions that are made there), or an item has several rows. Rows that were not "
    "sampled would count as data. Make such changes in the data set, the collate_fn, or the "
    "model's forward."
)


@pytest.mark.parametrize("allocation", ["joint", "equal"])
def test_padding_that_is_not_recognised_is_refused(allocation: str) -> None:
    clipping = BackpropClipping(allocation=allocation)
    private = private_of(rows=16, clipping=clipping, noise_multiplier=1.0)
    x, y = next(iter(private.loader))
    items = int(x.any(dim=1).sum())
    refused(private, (x - 0.5) / 2, y, NOT_RECOGNISED.format(rows=16, items=items))


@pytest.mark.parametrize("workers", [0, 1])
def test_no_sample_that_waits_hides_padding_that_is_not_recognised(workers: int) -> None:
    # With so many drawn ahead, some would have enough items.
    private = private_of(rows=4, noise_multiplier=1.0)
    if workers:
        private.loader.num_workers, private.loader.prefetch_factor = workers, 8
    drawn = private.loader.samples
    found = 0
    for x, y in list(private.loader):
        sample = drawn._signals[0].sample
        more = sample.items % 4 and not drawn._signals[0].skip
        try:
            train(private, [(x + 1, y)])
        except PrivacyViolationError:
            private.optimizer.zero_grad()
            found += 1
        else:
            assert not more
    assert found > 0
    assert private.steps < 3


def test_more_items_than_were_drawn_are_refused_as_ever() -> None:
    private = private_of(rows=16, noise_multiplier=1.0)
    x, y = next(iter(private.loader))
    items = int(x.any(dim=1).sum())
    x[items:] = x[0]
    refused(private, x, y, NOT_RECOGNISED.format(rows=16, items=items))


def test_a_call_without_a_tensor_is_refused() -> None:
    private = private_of(rows=8)
    packed = nn.utils.rnn.pack_sequence([torch.ones(1, 4)] * 2)
    with pytest.raises(CoverageError) as refusal:
        private.model(packed)
    assert str(refusal.value) == (
        "The model was called without a tensor that has one row for each example, so the rows "
        "that physical_batch_size has added cannot be recognised and would count as data. Pass "
        "the batch as tensors, and pack sequences inside the model."
    )
