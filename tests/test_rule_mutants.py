"""Ways for the layers' rules to be wrong, each killed by a check of the suite."""

import pytest
import torch
from opacus.layers import DPMultiheadAttention
from opacus.layers.dp_multihead_attention import SequenceBias
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from opacus_bpclip import BackpropClipping, PrivacyViolationError, coverage, norms
from opacus_bpclip.rules import (
    BilinearRule,
    ConvTransposeRule,
    EmbeddingBagRule,
    PReLURule,
    SequenceBiasRule,
    TransposedLinearRule,
)
from tests.checks import Trainer, check_independence, check_sensitivity, check_silent
from tests.layers import Bags, BatchSecond, Pair


def _saturated(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    bound: str = "weighted",
    height: float = 1e4,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Check the sensitivity on inputs and upstream gradients that all point the same way."""
    torch.manual_seed(0)
    trainer = Trainer(model, shape, BackpropClipping(bound=bound), dtype=dtype)
    x = torch.full((2, *shape), height, dtype=dtype)
    with torch.no_grad():
        outputs = model(x).flatten(1)
    check_sensitivity(trainer, x, torch.full_like(outputs, 1e4))


def repeated_token_of_a_bag():
    _saturated(Bags(nn.EmbeddingBag(2, 1, mode="sum")), (2, 9))


def mean_of_a_bag():
    _saturated(Bags(nn.EmbeddingBag(2, 1, mode="mean", padding_idx=1)), (2, 9), height=0.0)


def weights_of_a_bag():
    _saturated(Bags(nn.EmbeddingBag(2, 1, mode="sum"), weighted=True), (2, 9))


def bags_of_several_lengths():
    torch.manual_seed(0)
    model = Bags(nn.EmbeddingBag(2, 1, mode="sum"), offsets=True)
    trainer = Trainer(model, (2, 9), BackpropClipping())
    x = torch.zeros(2, 2, 9, dtype=torch.float64)
    x[:, 0, 0] = torch.tensor([2.0, 8.0])
    target = torch.tensor([[1e4], [-1e4]], dtype=torch.float64)
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)


def weight_of_a_bag_that_is_not_finite():
    model = Bags(nn.EmbeddingBag(2, 1, mode="sum"), weighted=True)
    trainer = Trainer(model, (2, 3), BackpropClipping())
    x = torch.ones(3, 2, 3, dtype=torch.float64)
    x[-1, 1, 0] = float("nan")
    check_silent(trainer, x, torch.ones(3, 1, dtype=torch.float64))


def many_equal_tokens():
    count = 20_000
    bag = Trainer(
        Bags(nn.EmbeddingBag(2, 1, mode="sum")), (2, count), BackpropClipping(), dtype=torch.float32
    )
    sequence = Trainer(nn.Embedding(2, 1), (count,), BackpropClipping(), dtype=torch.float32)
    for height in (0.7, 1.1, 3.3):
        check_sensitivity(bag, torch.zeros(1, 2, count), torch.full((1, 1), height))
        ids = torch.zeros(1, count, dtype=torch.long)
        check_sensitivity(sequence, ids, torch.full((1, count), height))


def transposed_convolution():
    _saturated(nn.ConvTranspose2d(1, 1, 2, bias=False), (1, 3, 3))


def transposed_convolution_with_bias():
    _saturated(nn.ConvTranspose2d(1, 1, 2, stride=2), (1, 3, 3), height=1.0)


def transposed_convolution_with_padding():
    _saturated(nn.ConvTranspose1d(1, 1, 3, stride=2, padding=2, bias=False), (1, 5))


def transposed_convolution_in_groups():
    model = nn.ConvTranspose1d(4, 2, 3, groups=2, bias=False)
    trainer = Trainer(model, (4, 5), BackpropClipping(bound="product"))
    x = torch.ones(2, 4, 5, dtype=torch.float64)
    x[:, 2:] = 1e4
    check_sensitivity(trainer, x, torch.full((2, 14), 1e4, dtype=torch.float64))


def pairs():
    _saturated(Pair(nn.Bilinear(2, 1, 1, bias=False)), (3, 3), bound="product")


def pairs_measured():
    _saturated(Pair(nn.Bilinear(2, 1, 1, bias=False)), (3, 3))


def negative_inputs():
    _saturated(nn.PReLU(), (9,), height=-10.0)
    _saturated(nn.PReLU(), (9,), height=-10.0, bound="exact")


def added_token():
    torch.manual_seed(0)
    trainer = Trainer(BatchSecond(SequenceBias(2)), (3, 2), BackpropClipping())
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    target = torch.zeros(5, 4, 2, dtype=torch.float64)
    target[:, -1] = 1e4
    check_sensitivity(trainer, x, target.flatten(1))
    check_independence(trainer, x, target.flatten(1))


def transposed_linear():
    _saturated(Conv1D(2, 3), (4, 3), height=0.1)


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = DPMultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


def attention_with_the_batch_second():
    torch.manual_seed(0)
    trainer = Trainer(_Attends(), (3, 4), BackpropClipping())
    # As many examples as steps: sizes cannot tell the axes apart.
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    x[-1] *= 100
    check_sensitivity(trainer, x, torch.randn(3, 12, dtype=torch.float64) * 100)
    check_independence(trainer, x, torch.randn(3, 12, dtype=torch.float64) * 100)


CHECKS = (
    repeated_token_of_a_bag,
    mean_of_a_bag,
    weights_of_a_bag,
    bags_of_several_lengths,
    weight_of_a_bag_that_is_not_finite,
    many_equal_tokens,
    transposed_convolution,
    transposed_convolution_with_bias,
    transposed_convolution_with_padding,
    transposed_convolution_in_groups,
    pairs,
    pairs_measured,
    negative_inputs,
    added_token,
    transposed_linear,
    attention_with_the_batch_second,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_real_code_passes_the_check(check):
    check()


def tokens_of_a_bag_taken_for_different_ones(patch):
    def mutant(self, bags, dtype):
        weights = torch.ones(len(bags.ids), dtype=dtype)
        if bags.weights is not None:
            weights = bags.weights.to(dtype)
        squares = torch.zeros(bags.number, dtype=dtype).index_add(0, bags.bag, weights.square())
        return squares.sqrt()

    patch.setattr(EmbeddingBagRule, "_column_norms", mutant)


def padding_counted_in_the_mean(patch):
    real = EmbeddingBagRule._column_norms

    def mutant(self, bags, dtype):
        sizes = torch.zeros(bags.number, dtype=dtype).index_add(
            0, bags.bag, torch.ones(len(bags.ids), dtype=dtype)
        )
        return real(self, bags, dtype) / sizes

    patch.setattr(EmbeddingBagRule, "_column_norms", mutant)


def weights_of_a_bag_ignored(patch):
    real = EmbeddingBagRule._column_norms

    def mutant(self, bags, dtype):
        return real(self, bags._replace(weights=None), dtype)

    patch.setattr(EmbeddingBagRule, "_column_norms", mutant)


def bags_taken_for_equally_long(patch):
    real = EmbeddingBagRule._bags

    def mutant(self, inputs):
        bags = real(self, inputs)
        each = -(-len(bags.ids) // max(bags.number, 1))
        return bags._replace(bag=torch.arange(len(bags.ids)) // max(each, 1))

    patch.setattr(EmbeddingBagRule, "_bags", mutant)


def weights_that_are_not_finite_let_in(patch):
    def mutant(self, inputs, max_norm):
        prepared = real(self, inputs, max_norm)
        return prepared._replace(finite=torch.ones_like(prepared.finite))

    real = EmbeddingBagRule.prepare
    patch.setattr(EmbeddingBagRule, "prepare", mutant)


def additions_taken_for_exact(patch):
    patch.setattr(norms, "accumulation", lambda positions, dtype: 1)


def patches_not_added_up(patch):
    """The largest position's patch instead of the sum over positions."""

    def mutant(g, column_norms, *_):
        return torch.linalg.vector_norm(
            g.abs().amax(3) * column_norms.amax(2)[..., None], dim=(1, 2)
        )

    patch.setattr(norms, "weighted_bound", mutant)


def output_bias_uncovered(patch):
    patch.setattr(ConvTransposeRule, "_bias_bound", lambda self, kind, g: g.new_zeros(len(g)))


def output_bias_taken_for_a_part_of_the_columns(patch):
    """As for a convolution, whose columns are the output's positions: ``sqrt(u^2 + 1)``."""

    def mutant(self, kind, g):
        return norms.weighted_bound(self.upstream(g)[..., :1], torch.ones(len(g), self.groups, 1))

    patch.setattr(ConvTransposeRule, "_bias_bound", mutant)


def patches_without_padding(patch):
    patch.setattr(ConvTransposeRule, "_aligned", lambda self, g, x: g[..., :4])


def pixels_clipped_by_one_group(patch):
    real = ConvTransposeRule.clip_factor

    def mutant(self, column_norms, max_norm):
        return real(self, column_norms[:, :1], max_norm).expand_as(column_norms)

    patch.setattr(ConvTransposeRule, "clip_factor", mutant)


def each_input_clipped_to_the_whole_norm(patch):
    real = BilinearRule.prepare

    def mutant(self, inputs, max_norm):
        return real(self, inputs, max_norm and max_norm**2)

    patch.setattr(BilinearRule, "prepare", mutant)


def one_input_measured(patch):
    real = BilinearRule.prepare

    def mutant(self, inputs, max_norm):
        one, other = inputs
        prepared = real(self, inputs, max_norm)
        return prepared._replace(
            norms=real(self, (one, torch.ones_like(other)), max_norm).norms / 2
        )

    patch.setattr(BilinearRule, "prepare", mutant)


def positive_inputs_taken_for_negative(patch):
    real = PReLURule.bound

    def mutant(self, kind, g, inputs, input_norms, max_norm):
        return real(self, kind, g, (-inputs[0],), input_norms, max_norm)

    patch.setattr(PReLURule, "bound", mutant)


def positions_of_a_slope_not_added_up(patch):
    real = PReLURule._by_slope

    def mutant(self, x):
        return real(self, x).transpose(1, 2)

    patch.setattr(PReLURule, "_by_slope", mutant)


def first_token_taken_for_the_added_one(patch):
    patch.setattr(SequenceBiasRule, "bound", lambda self, kind, g, *_: norms.row_norms(g[:, 0]))


def added_token_with_the_batch_first(patch):
    patch.setattr(SequenceBiasRule, "batch_axis", lambda self, default: default)


def bias_of_a_transposed_linear_layer_uncovered(patch):
    real = TransposedLinearRule.from_module.__func__

    def mutant(cls, module):
        rule = real(cls, module)
        return cls(rule.weight, False, rule.in_features)

    patch.setattr(TransposedLinearRule, "from_module", classmethod(mutant))


def attention_taken_for_layers_of_the_model(patch):
    patch.setattr(coverage, "attention_axes", lambda model: {})


MUTANTS = [
    (tokens_of_a_bag_taken_for_different_ones, repeated_token_of_a_bag),
    (padding_counted_in_the_mean, mean_of_a_bag),
    (weights_of_a_bag_ignored, weights_of_a_bag),
    (bags_taken_for_equally_long, bags_of_several_lengths),
    (weights_that_are_not_finite_let_in, weight_of_a_bag_that_is_not_finite),
    (additions_taken_for_exact, many_equal_tokens),
    (patches_not_added_up, transposed_convolution),
    (output_bias_uncovered, transposed_convolution_with_bias),
    (output_bias_taken_for_a_part_of_the_columns, transposed_convolution_with_bias),
    (patches_without_padding, transposed_convolution_with_padding),
    (pixels_clipped_by_one_group, transposed_convolution_in_groups),
    (each_input_clipped_to_the_whole_norm, pairs),
    (one_input_measured, pairs_measured),
    (positive_inputs_taken_for_negative, negative_inputs),
    (positions_of_a_slope_not_added_up, negative_inputs),
    (first_token_taken_for_the_added_one, added_token),
    (added_token_with_the_batch_first, added_token),
    (bias_of_a_transposed_linear_layer_uncovered, transposed_linear),
    (attention_taken_for_layers_of_the_model, attention_with_the_batch_second),
]


@pytest.mark.parametrize(
    ("mutant", "check"), MUTANTS, ids=[f"{m.__name__} by {c.__name__}" for m, c in MUTANTS]
)
def test_the_mutant_is_killed(mutant, check, monkeypatch):
    mutant(monkeypatch)
    # The guard on every batch may be the one that sees it.
    with pytest.raises((AssertionError, PrivacyViolationError)):
        check()
