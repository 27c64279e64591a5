"""EmbeddingBag's own ways to be called: offsets, weights from other layers, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import CoverageError
from opacus_bpclip.rules import RULES, bound_of
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence, check_sensitivity, joint
from tests.layers import Bags
from tests.strategies import (
    BOUNDS,
    clippings,
    hostile_batches,
    hostile_examples,
    scales,
    seed_torch,
)

TOKENS = 4


def _scored(**options) -> nn.Module:
    layer = nn.EmbeddingBag(5, 3, mode="sum", padding_idx=options.pop("padding_idx", None))
    return Bags(layer, weighted=True, score=nn.Linear(TOKENS, TOKENS), **options)


@st.composite
def scored(draw):
    seed_torch(draw)
    model = _scored(offsets=draw(st.booleans()), padding_idx=draw(st.sampled_from([None, 2])))
    trainer = Trainer(model, (2, TOKENS), draw(clippings()), max_grad_norm=0.7)
    companions = draw(hostile_batches((2, TOKENS)))
    x = torch.cat([companions, draw(hostile_examples((2, TOKENS), torch.float64))[None]])
    rows = torch.tensor([draw(scales) for _ in range(len(x))], dtype=torch.float64)
    return trainer, x, torch.randn(len(x), 3, dtype=torch.float64) * rows[:, None]


@given(scored())
def test_weights_that_a_layer_makes_pass_the_clipped_gradient_on(case):
    check_sensitivity(*case)
    check_independence(*case)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_clipping_such_weights_get_autograds_gradient(offsets, reduction):
    torch.manual_seed(0)
    model = _scored(offsets=offsets).double()
    x = torch.randn(4, 2, TOKENS, dtype=torch.float64) * 3
    target = torch.randn(4, 3, dtype=torch.float64)
    (model(x) * target).sum().backward()
    own = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    clipping = layerwise(bound="exact", max_input_norm=None)
    trainer = Trainer(model, (2, TOKENS), clipping, max_grad_norm=1e9, reduction=reduction)
    assert torch.allclose(joint(trainer.released(x, target)), own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_in_one_row_contribute_what_bags_in_rows_do(mode):
    torch.manual_seed(0)
    layer = nn.EmbeddingBag(5, 3, mode=mode)
    x = torch.randn(4, 2, TOKENS, dtype=torch.float64) * 3
    x[:, 0, 0] = TOKENS  # all tokens of each bag
    target = torch.randn(4, 3, dtype=torch.float64) * 100
    trainers = [
        Trainer(Bags(copy.deepcopy(layer), offsets=offsets), (2, TOKENS), layerwise())
        for offsets in (False, True)
    ]
    sums = [joint(trainer.released(x, target)) for trainer in trainers]
    assert torch.allclose(*sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    ("mode", "ids", "norm"),
    [
        ("sum", [1, 1, 1, 2], 10**0.5),
        ("mean", [1, 1, 1, 2], 10**0.5 / 4),
        ("max", [1, 1, 1, 2], 1.0),
    ],
    ids=["sum", "mean", "max"],
)
def test_the_column_is_the_count_of_each_token(mode, ids, norm, bound):
    layer = nn.EmbeddingBag(3, 1, mode=mode).double()
    rule = RULES[nn.EmbeddingBag].from_module(layer)
    g = torch.full((1, 1), 2.0, dtype=torch.float64)
    inputs = (torch.tensor([ids]), None, None)
    assert float(bound_of(bound).of(rule, g, inputs, None, None)) == pytest.approx(
        2 * norm, rel=1e-9
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm rewrites"),
        ({"scale_grad_by_freq": True, "mode": "sum"}, "scale_grad_by_freq divides"),
        ({"sparse": True}, "sparse gradient"),
    ],
    ids=["max_norm", "scale_grad_by_freq", "sparse"],
)
def test_options_that_couple_examples_are_refused(options, reason):
    with pytest.raises(CoverageError, match=reason):
        RULES[nn.EmbeddingBag].from_module(nn.EmbeddingBag(4, 2, **options))


class Flat(nn.Module):
    """Takes the offsets as they are; the batch's size is the root's first argument's."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.layer = nn.EmbeddingBag(9, 2, mode="sum", **options)

    def forward(self, x: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.layer(ids, offsets)


@pytest.mark.parametrize(
    ("options", "offsets", "message"),
    [
        ({}, [0, 3, 2], "the offsets must start at 0 and never decrease"),
        ({}, [1, 2, 3], "has to be 0"),
        ({"include_last_offset": True}, [0, 1, 2, 4], "the last offset must be the number of ids"),
    ],
    ids=["unsorted", "late", "behind the last"],
)
def test_offsets_that_leave_ids_to_nobody_are_refused(options, offsets, message):
    # PyTorch gives ids behind the last offset a gradient from beyond the end of the upstream one.
    model = Flat(**options)
    trainer = Trainer(model, (1,), layerwise())
    with pytest.raises(RuntimeError, match=message):
        trainer.model(torch.zeros(3, 1).double(), torch.arange(5), torch.tensor(offsets))


def test_another_number_of_bags_than_examples_is_refused():
    trainer = Trainer(Flat(), (1,), layerwise())
    with pytest.raises(RuntimeError, match="in a batch of 3 examples"):
        trainer.model(torch.zeros(3, 1).double(), torch.arange(5), torch.tensor([0, 2]))


def test_many_equal_tokens_are_rounded_within_the_bound():
    # In float32, a sum of 20,000 equal numbers is off by more than a norm's usual margin.
    count = 20_000
    trainer = Trainer(
        Bags(nn.EmbeddingBag(2, 1, mode="sum")),
        (2, count),
        layerwise(),
        dtype=torch.float32,
    )
    for height in (0.7, 1.1, 3.3):
        reached = joint(trainer.released(torch.zeros(1, 2, count), torch.tensor([[height]]))).norm()
        assert 0.99 <= reached <= 1.0
