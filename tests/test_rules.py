"""Every rule against plain autograd, one example at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip import CoverageError
from opacus_bpclip.rules import RULES
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence, check_sensitivity, joint
from tests.layers import Pair, Tokens
from tests.strategies import BOUNDS, MODES, layer_cases, scales, seeds


def _own_gradient(layer, x, target):
    """Return the gradient of one example by autograd, without the package."""
    loss = (layer(x).flatten(1) * target).sum()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def _check_exact(layer, shape, x, target, limit):
    alone = [_own_gradient(layer, x[i : i + 1], target[i : i + 1]) for i in range(len(x))]
    clipping = layerwise(bound="exact", max_input_norm=None)
    trainer = Trainer(layer, shape, clipping, max_grad_norm=limit)
    expected = sum(gradient * min(1, limit / float(gradient.norm() + 1e-300)) for gradient in alone)
    assert torch.allclose(joint(trainer.released(x, target)), expected, rtol=1e-6, atol=1e-9)


@given(layer_cases, seeds, st.sampled_from([1e-2, 1.0, 1e3]))
def test_exact_is_the_examples_own_gradient_clipped_to_the_limit(case, seed, limit):
    torch.manual_seed(seed)
    layer = case.layer.double()
    x = torch.randn(3, *case.shape, dtype=torch.float64)
    target = torch.randn(3, layer(x).flatten(1).shape[1], dtype=torch.float64)
    _check_exact(layer, case.shape, x, target, limit)


@st.composite
def embedding_cases(draw):
    torch.manual_seed(draw(seeds))
    vocabulary, channels = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    axes = tuple(draw(st.lists(st.integers(1, 5), max_size=2)))
    padding = draw(st.one_of(st.none(), st.integers(0, vocabulary - 1)))
    layer = nn.Embedding(vocabulary, channels, padding_idx=padding).double()
    ids = torch.randint(vocabulary, (draw(st.integers(1, 5)), *axes))
    target = torch.randn(len(ids), ids[0].numel() * channels, dtype=torch.float64)
    rows = torch.tensor([draw(scales) for _ in ids], dtype=torch.float64)
    return layer, axes, ids, target * rows[:, None]


@given(embedding_cases(), st.sampled_from(MODES), st.sampled_from(["mean", "sum"]))
def test_one_sequence_of_tokens_moves_an_embedding_by_at_most_its_sensitivity(
    case, mode, reduction
):
    layer, axes, ids, target = case
    bound, normalize = mode
    clipping = layerwise(bound=bound, normalize=normalize)
    trainer = Trainer(layer, axes, clipping, reduction=reduction)
    check_sensitivity(trainer, ids, target)
    check_independence(trainer, ids, target)


@given(embedding_cases())
def test_exact_embedding_adds_up_the_positions_of_each_token(case):
    layer, axes, ids, target = case
    target = target / target.norm(dim=1, keepdim=True).clamp(min=1e-300)
    _check_exact(layer, axes, ids, target, 0.5)


@pytest.mark.parametrize(("bound", "normalize"), MODES)
def test_a_token_reaches_the_embeddings_bound(bound, normalize):
    trainer = Trainer(
        nn.Embedding(7, 3).double(), (4,), layerwise(bound=bound, normalize=normalize)
    )
    target = torch.zeros(1, 12, dtype=torch.float64)
    target[0, 4] = 1e4
    reached = joint(trainer.released(torch.tensor([[1, 2, 2, 6]]), target)).norm()
    assert 0.999 <= reached <= 1.0


def test_a_repeated_token_counts_as_often_as_it_stands():
    trainer = Trainer(nn.Embedding(3, 1).double(), (4,), layerwise(bound="exact"))
    ids = torch.zeros(1, 4, dtype=torch.long)
    contribution = joint(trainer.released(ids, torch.full((1, 4), 0.5, dtype=torch.float64)))
    # Unclipped, the row's gradient is 2, four times what each position gives.
    assert torch.allclose(contribution, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm rewrites"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq divides"),
        ({"sparse": True}, "sparse gradient"),
    ],
    ids=["max_norm", "scale_grad_by_freq", "sparse"],
)
def test_embedding_options_that_couple_examples_are_refused(options, reason):
    with pytest.raises(CoverageError, match=reason):
        RULES[nn.Embedding].from_module(nn.Embedding(4, 2, **options))


def test_running_statistics_are_refused():
    layer = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    with pytest.raises(CoverageError, match="statistics over the examples"):
        RULES[nn.InstanceNorm1d].from_module(layer)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_mean_far_above_the_deviations_does_not_pass_for_a_large_normalised_value(bound):
    # x - mean cancels: uncentred, LayerNorm's own arithmetic gives a gradient 1e5 times the bound.
    layer = nn.LayerNorm(8, eps=1e-12)
    trainer = Trainer(layer, (3, 8), layerwise(bound=bound), dtype=torch.float32)
    x = 1e8 + torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    check_sensitivity(trainer, x, torch.ones(2, 24))


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm((4, 6)), nn.GroupNorm(2, 4)], ids=["layer", "group"]
)
def test_taking_the_means_away_changes_neither_output_nor_input_gradient(layer):
    layer = layer.double()
    rule = RULES[type(layer)].from_module(layer)
    gradients = []
    for prepare in (lambda x: x, lambda x: rule.prepare((x,), None).inputs[0]):
        torch.manual_seed(0)
        x = (torch.randn(3, 4, 6, dtype=torch.float64) + 2).requires_grad_()
        y = layer(prepare(x))
        (y * torch.randn(y.shape, dtype=y.dtype)).sum().backward()
        gradients.append((y.detach(), x.grad))
    for plain, centred in zip(*gradients, strict=True):
        assert torch.allclose(plain, centred, rtol=1e-9, atol=1e-12)


MANY = 20_000
LONG = {
    "linear": (lambda: nn.Linear(8, 8), (MANY, 8)),
    "linear, no bias": (lambda: nn.Linear(1, 1, bias=False), (MANY, 1)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 3), (2, 100, 200)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(1, 2, 2, stride=2), (1, 100, 200)),
    "bilinear": (lambda: Pair(nn.Bilinear(1, 1, 1, bias=False)), (MANY, 2)),
    "prelu": (nn.PReLU, (MANY,)),
    "layer norm": (lambda: nn.LayerNorm(2), (MANY, 2)),
    "embedding": (lambda: Tokens(nn.Embedding(2, 1)), (MANY,)),
}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("layer", LONG)
def test_many_equal_positions_are_rounded_within_the_bound(layer, bound):
    # In float32, a sum of 20,000 equal numbers, one by one, is off by 1e-4 of itself.
    if layer == "embedding" and bound == "exact":
        return  # one Gram matrix of 20,000 x 20,000
    make, shape = LONG[layer]
    torch.manual_seed(0)
    model = make()
    trainer = Trainer(model, shape, layerwise(bound=bound), dtype=torch.float32)
    x = torch.full((1, *shape), -2.0)
    if layer == "layer norm":
        x[..., 0] = 2.0
    with torch.no_grad():
        outputs = model(x).flatten(1)
    for height in (0.7, 1.1, 3.3):
        released = joint(trainer.released(x, torch.full_like(outputs, height)))
        # Not in float32: the norm's own sum would drift as well.
        assert released.double().norm() <= 1.0


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 2, 1),
        nn.ConvTranspose1d(2, 2, 1),
        nn.GroupNorm(1, 2),
        nn.InstanceNorm1d(2, affine=True),
        nn.PReLU(2),
        nn.EmbeddingBag(2, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_with_channels_second_has_the_batch_first_in_any_model(layer):
    # With as many examples as channels, a model's batch_first=False would pass unnoticed.
    assert RULES[type(layer)].from_module(layer).batch_axis(1) == 0
