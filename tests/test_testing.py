"""`check_rule` accepts every rule of the package, and rejects a rule that breaks a promise."""

import pytest
import torch
import torch.nn.functional as F
from opacus.layers.dp_multihead_attention import SequenceBias
from torch import nn
from transformers.pytorch_utils import Conv1D

from opacus_bpclip.rules import RULES, ConvRule, LinearRule, registered_kind
from opacus_bpclip.testing import check_rule


def _floats(*shape):
    return lambda count: torch.randn(count, *shape)


def _ids(vocabulary, *shape):
    return lambda count: torch.randint(vocabulary, (count, *shape))


LAYERS = {
    nn.Linear: (lambda: nn.Linear(3, 2), _floats(4, 3)),
    nn.Conv1d: (lambda: nn.Conv1d(2, 4, 3, groups=2, padding=1), _floats(2, 6)),
    nn.Conv2d: (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), _floats(2, 5, 5)),
    nn.Conv3d: (lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="reflect"), _floats(1, 3, 3, 3)),
    nn.ConvTranspose1d: (
        lambda: nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, groups=2),
        _floats(4, 4),
    ),
    nn.ConvTranspose2d: (
        lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1),
        _floats(2, 3, 2),
    ),
    nn.ConvTranspose3d: (
        lambda: nn.ConvTranspose3d(1, 2, 2, dilation=2, bias=False),
        _floats(1, 2, 2, 2),
    ),
    nn.Embedding: (lambda: nn.Embedding(5, 3), _ids(5, 4)),
    nn.EmbeddingBag: (
        lambda: nn.EmbeddingBag(5, 3, mode="sum"),
        lambda count: (torch.randint(5, (count, 4)), None, torch.randn(count, 4)),
    ),
    SequenceBias: (lambda: SequenceBias(3), lambda count: torch.randn(4, count, 3)),
    Conv1D: (lambda: Conv1D(2, 3), _floats(4, 3)),
    nn.LayerNorm: (lambda: nn.LayerNorm(6), _floats(3, 6)),
    nn.RMSNorm: (lambda: nn.RMSNorm(6), _floats(3, 6)),
    nn.GroupNorm: (lambda: nn.GroupNorm(2, 4), _floats(4, 3, 3)),
    nn.InstanceNorm1d: (lambda: nn.InstanceNorm1d(4, affine=True), _floats(4, 6)),
    nn.InstanceNorm2d: (lambda: nn.InstanceNorm2d(2, affine=True), _floats(2, 3, 3)),
    nn.InstanceNorm3d: (lambda: nn.InstanceNorm3d(1, affine=True), _floats(1, 3, 3, 2)),
}


# test_every_rule.py searches all of them in every run. These differ in what they take.
EVERYDAY = (nn.Conv1d, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, SequenceBias)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in EVERYDAY else pytest.param(kind, marks=pytest.mark.slow) for kind in LAYERS],
    ids=lambda kind: kind.__name__,
)
def test_a_rule_of_the_package_keeps_its_promises(kind):
    make_layer, inputs = LAYERS[kind]
    check_rule(registered_kind(kind)[1], make_layer, inputs, rounds=1)


def _spike(*shape: int, height: float = 1e4) -> torch.Tensor:
    x = torch.zeros(1, *shape)
    x.view(-1)[0] = height
    return x


def test_bilinear_keeps_its_promises():
    # Its worst case is large in both inputs.
    check_rule(
        RULES[nn.Bilinear],
        lambda: nn.Bilinear(2, 3, 2),
        lambda count: (torch.randn(count, 4, 2), torch.randn(count, 4, 3)),
        worst_case=((_spike(4, 2), _spike(4, 3)), _spike(4, 2)),
        rounds=1,
    )


def test_prelu_keeps_its_promises():
    # Its worst case is negative.
    check_rule(
        RULES[nn.PReLU],
        lambda: nn.PReLU(3),
        _floats(3, 4),
        worst_case=(_spike(3, 4, height=-1e4), _spike(3, 4)),
        rounds=1,
    )


class Altered(LinearRule):
    """Makes something else of each of the three bounds."""

    def altered(self, own):
        raise NotImplementedError

    def product(self, *args):
        return self.altered(super().product(*args))

    def weighted(self, *args):
        return self.altered(super().weighted(*args))

    def exact(self, *args):
        return self.altered(super().exact(*args))


class HalfTheBound(Altered):
    def altered(self, own):
        return own / 2


class TwiceTheBound(Altered):
    def altered(self, own):
        return own * 2


class ByTheBatch(Altered):
    def altered(self, own):
        return own.amax().expand_as(own) if len(own) else own


class Changed(LinearRule):
    def prepare(self, inputs, max_norm):
        return super().prepare((inputs[0].abs(),), max_norm)


class NotFinite(LinearRule):
    def prepare(self, inputs, max_norm):
        prepared = super().prepare(inputs, max_norm)
        return prepared._replace(finite=torch.ones_like(prepared.finite))


class BiasUncovered(LinearRule):
    """Reports the bias's gradient as covered, and is not."""

    def product(self, *args):
        return LinearRule(self.weight, False, self.in_features).product(*args)

    def weighted(self, *args):
        return LinearRule(self.weight, False, self.in_features).weighted(*args)

    def exact(self, *args):
        return LinearRule(self.weight, False, self.in_features).exact(*args)


class PositionsInSquares(LinearRule):
    """As if positions could not point the same way."""

    def weighted(self, g, inputs, input_norms):
        columns = (input_norms.square() + 1).sqrt()
        return torch.linalg.vector_norm(self.upstream(g) * columns[:, :, None], dim=(1, 2, 3))


class LastEntryOnly(LinearRule):
    """Looks for nan in the last entry only."""

    def prepare(self, inputs, max_norm):
        (x,) = inputs
        prepared = super().prepare(inputs, max_norm)
        return prepared._replace(finite=x.flatten(1)[:, -1].isfinite())


class Remembers(Altered):
    """One factor for all, by the largest example of all batches so far."""

    def altered(self, own):
        self.__dict__["seen"] = max(self.__dict__.get("seen", 0.0), *own.tolist(), 0.0)
        return torch.full_like(own, self.__dict__["seen"])


class MixesUpwards(LinearRule):
    """Takes the batch's mean off the input: the layer's own gradient, a bias's, never shows it."""

    def prepare(self, inputs, max_norm):
        (x,) = inputs
        return super().prepare((x - x.nan_to_num().mean(dim=0) if len(x) else x,), max_norm)


class MixesDownwards(LinearRule):
    """Scales the gradient of the input by the largest input of the batch."""

    def prepare(self, inputs, max_norm):
        prepared = super().prepare(inputs, max_norm)
        (scale,) = prepared.scales or (torch.ones(1, dtype=inputs[0].dtype),)
        if not len(inputs[0]):
            return prepared
        return prepared._replace(scales=(scale / (1 + inputs[0].nan_to_num().abs().max()),))


def _bias_alone():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    return layer


class Reflected(ConvRule):
    """Measures patches as if the border were padded with zeros."""

    def _pad(self, x):
        return F.pad(x, self.padding) if any(self.padding) else x


class BiasAloneForgotten(Altered):
    """Right for the weight, and wrong where only the bias is trained."""

    def altered(self, own):
        return own * (1.0 if self.weight else 0.1)


@pytest.mark.parametrize(
    ("rule", "promise"),
    [
        (HalfTheBound, "bound"),
        (TwiceTheBound, "attainment"),
        (ByTheBatch, "independence"),
        (Changed, "direction"),
        (NotFinite, "not finite"),
        (BiasUncovered, "bound"),
        (PositionsInSquares, "bound"),
        (LastEntryOnly, "not finite"),
        (Remembers, "independence"),
        (MixesDownwards, "independence"),
        (BiasAloneForgotten, "bound"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_promise_is_named(rule, promise):
    with pytest.raises(AssertionError, match=rf"{rule.__name__} with bound=.* promise: {promise}:"):
        check_rule(rule, *LAYERS[nn.Linear])


def test_a_rule_that_mixes_examples_in_its_output_alone_is_convicted():
    with pytest.raises(AssertionError, match=r"independence: the output or the input's gradient"):
        check_rule(MixesUpwards, _bias_alone, LAYERS[nn.Linear][1])


def test_a_rule_that_is_wrong_at_the_border_alone_is_convicted():
    def reflected():
        return nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect", bias=False)

    check_rule(ConvRule, reflected, _floats(1, 5), rounds=1)
    with pytest.raises(AssertionError, match=r"promise: bound:"):
        check_rule(Reflected, reflected, _floats(1, 5), rounds=1)


def test_the_registry_is_as_before():
    before = dict(RULES)

    class Own(nn.Linear):
        pass

    check_rule(LinearRule, lambda: Own(2, 2), _floats(2), rounds=1)
    assert before == RULES


def test_a_worst_case_may_be_given():
    worst = (torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    check_rule(LinearRule, lambda: nn.Linear(2, 2), _floats(2), worst_case=worst, rounds=1)
    idle = (torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(
        AssertionError, match=r"attainment: examples reach at most 0\.0000 of the limit"
    ):
        check_rule(LinearRule, lambda: nn.Linear(2, 2), _floats(2), worst_case=idle, rounds=1)


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    check_rule(LinearRule, lambda: nn.Linear(2, 2), _floats(2), rounds=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_weight_is_checked_by_its_bias():
    check_rule(LinearRule, _bias_alone, _floats(3), rounds=1)
