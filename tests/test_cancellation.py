"""Rounding errors after cancellation are not magnified: blank, equal, many other examples."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip.rules import GroupNormRule, LayerNormRule, RMSNormRule
from opacus_bpclip.rules.cancellation import ORDINARY, ROUNDING, cancellation_factor
from tests.budgets import layerwise
from tests.checks import Trainer, check_sensitivity, joint
from tests.companions import (
    Criterion,
    blank_and_one,
    check_attention,
    check_rounding_is_small,
    mixer,
    models,
)

EPS = torch.finfo(torch.float32).eps
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_the_factor_is_between_0_and_1_and_continuous(one, other):
    ulps = torch.tensor([one, other], dtype=torch.float64)
    factors = cancellation_factor(ulps * EPS, torch.ones(2).double(), torch.float32)
    assert ((factors >= 0) & (factors <= 1)).all()
    assert (factors[0] - factors[1]).abs() <= abs(one - other) / (ORDINARY - ROUNDING) + 1e-9
    assert one > ROUNDING or factors[0] == 0
    assert one < ORDINARY or factors[0] == 1


def test_nothing_is_suppressed_where_nothing_cancelled_or_it_overflows():
    remainder = torch.tensor([0.0, float("inf"), float("nan"), 1.0])
    cancelled = torch.tensor([0.0, float("inf"), 1.0, float("nan")])
    assert torch.equal(cancellation_factor(remainder, cancelled, torch.float32), torch.ones(4))


SIZES = st.sampled_from([2, 3, 7, 49, 64, 196, 1024, 3136, 12544, 50176])


@DTYPES
@given(st.data())
@settings(max_examples=50)
def test_a_gradient_that_is_equal_over_a_group_sends_exactly_nothing_down(dtype, data):
    # In float32 torch's kernels leave 8e-5 of it at 50,176 positions, times 316 for a constant.
    size, generator = data.draw(SIZES), torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scale = 10.0 ** data.draw(st.integers(-12, 12))
    n = data.draw(st.integers(1, 2000))
    x = torch.randn(2, 3, size, generator=generator, dtype=dtype)
    if data.draw(st.booleans()):
        x = x[..., :1].repeat(1, 1, size)
    g = scale * torch.rand(2, 3, 1, generator=generator, dtype=dtype).expand(x.shape) / n
    group, layer = nn.GroupNorm(3, 3).to(dtype), nn.LayerNorm(size).to(dtype)
    for rule, weight in (
        (GroupNormRule.from_module(group), torch.ones(3, dtype=dtype)),
        (LayerNormRule.from_module(layer), None),
    ):
        assert not rule.input_gradient(g, x, weight).any(), type(rule).__name__


@given(st.data())
@settings(max_examples=100)
def test_a_change_of_rounding_size_changes_what_goes_down_by_little(data):
    # Also where next to nothing is left, and none of it can be told from rounding.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    left = 10.0 ** data.draw(st.floats(-7, 0))
    x, g = draw(1, 1, 64).float(), (1 + left * draw(1, 1, 64)).float()
    changed = (g.double() * (1 + EPS * draw(1, 1, 64).clamp(-1, 1))).float()
    rule = GroupNormRule.from_module(nn.GroupNorm(1, 1))
    rstd = x.std(correction=0).reciprocal()
    one, other = (rule.input_gradient(h, x, torch.ones(1)) for h in (g, changed))
    size = g.norm() * rstd
    assert (one - other).norm() <= 8 * EPS * size
    exact = rule.input_gradient(g.double(), x.double(), torch.ones(1).double())
    assert one.norm() <= exact.norm() + 2 * EPS * size
    if exact.norm() >= 1.1 * ORDINARY * EPS * size:
        assert (one - exact).norm() <= 2 * EPS * size


def test_a_root_mean_square_norm_of_constants_sends_nothing_down():
    rule = RMSNormRule.from_module(nn.RMSNorm(64, eps=1e-12))
    for n in (1, 3, 999):
        x, g = torch.full((1, 64), 1.7), torch.full((1, 64), 0.3) / n
        assert not rule.input_gradient(g, x, None).any()


@pytest.mark.parametrize("only", ["all layers", "0", "2", "3.2", "6", "10", "13"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.1])
def test_blank_companions_do_not_follow_the_batchs_size(only, max_grad_norm):
    # 2.4 / 0.2 of layer 2's limit, and 47 times the claim with that layer alone at 0.1.
    model = mixer()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(only in ("all layers", name.rpartition(".")[0]))
    trainer = Trainer(
        model,
        (3, 32, 32),
        layerwise(),
        max_grad_norm=max_grad_norm,
        loss=Criterion("cross-entropy").plain,
        dtype=torch.float32,
    )
    check_sensitivity(trainer, *blank_and_one(1023, (3, 32, 32)))


def test_frozen_normalisations_do_not_follow_it_either():
    # 1.4 times the first layer's limit, while instance norms were left to torch's kernels.
    torch.manual_seed(18)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(1, 4),
        nn.Conv2d(4, 4, 1),
        nn.GELU(),
        nn.InstanceNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Linear(4, 5),
    )
    trainer = Trainer(
        model,
        (3, 8, 8),
        layerwise(bound="exact", max_input_norm=None),
        loss=Criterion("cross-entropy", scale=20.0).plain,
        dtype=torch.float32,
    )
    check_sensitivity(trainer, *blank_and_one(999, (3, 8, 8)))


CANCELLING = {
    "convolution": nn.Conv1d(2, 2, 1),
    "group norm": nn.GroupNorm(2, 2),
    "instance norm": nn.InstanceNorm1d(2, affine=True),
}


@pytest.mark.parametrize("layer", CANCELLING.values(), ids=CANCELLING)
@pytest.mark.parametrize("bound", ["product", "weighted", "exact"])
def test_an_own_gradient_that_is_nothing_but_rounding_is_not_scaled_to_the_limit(layer, bound):
    # A norm's went to the limit, a convolution's in the exact bound to 1e-2, of each companion.
    check_rounding_is_small(copy.deepcopy(layer), bound)


@given(models(), st.sampled_from(["criterion", "sum"]), st.data())
def test_without_a_division_no_companions_move(made, way, data):
    kind = data.draw(st.sampled_from(["cross-entropy", "probabilities", "differences", "sines"]))
    _search(made, way, kind, data, slack=1e-3)


@given(models(), st.data())
def test_behind_a_plain_mean_blank_and_equal_companions_stay(made, data):
    _search(made, "mean", "cross-entropy", data, slack=2e-2)


def _search(made: tuple[nn.Module, int], way: str, kind: str, data: st.DataObject, slack: float):
    model, size = made
    reduction = "sum" if way == "sum" else "mean"
    loss = Criterion(kind, scale=data.draw(st.sampled_from([1.0, 20.0, 1e4])), reduction=reduction)
    limit = data.draw(st.sampled_from([0.1, 1.0]))
    trainer = Trainer(
        model,
        (3, size, size),
        layerwise(
            bound=data.draw(st.sampled_from(["weighted", "exact"])),
            max_input_norm=data.draw(st.sampled_from([None, 3.0])),
        ),
        max_grad_norm=limit,
        reduction=reduction,
        loss=loss.plain,
        criterion=loss if way == "criterion" else None,
        dtype=torch.float32,
    )
    counts = [17, 100, 255, 511, 999, 1023, 1999]
    if kind not in ("probabilities", "differences"):
        # Of which nothing but rounding is left: kernels round a row otherwise in a smaller batch.
        counts = [1, 6, 15, *counts]
    count = data.draw(st.sampled_from(counts))
    companion = data.draw(st.sampled_from(["black", "grey", "half", "any"]))
    x, target = blank_and_one(count, (3, size, size), companion)
    with_z, without_z = (joint(trainer.released(x[:k], target[:k])) for k in (count + 1, count))
    moved: Tensor = (with_z.double() - without_z.double()).norm()
    assert moved <= limit * (1 + slack), f"moved by {moved / limit} times the claim"


def with_softmax(dim: int = -1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.Softmax(dim))


def _equal_rows(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    one, other = torch.randn(2, 1, 4, generator=generator)
    x = torch.cat([one.expand(count, 4), other])
    return x, torch.zeros(len(x), 8)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("count", [1, 30, 200, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_the_sum_of_a_softmax_layer_does_not_follow_the_batchs_size(
    scale, count, reduction
):
    # 4.9, 30 and 1,000 times the claim behind a plain mean, with torch's own backward pass.
    def total(output: Tensor, target: Tensor, reduction: str) -> Tensor:
        losses = scale * output.flatten(1).sum(dim=1)
        return losses.mean() if reduction == "mean" else losses.sum()

    trainer = Trainer(
        with_softmax(), (4,), layerwise(), loss=total, reduction=reduction,
        dtype=torch.float32,
    )  # fmt: skip
    x, target = _equal_rows(count)
    assert not joint(trainer.released(x, target)).any()


@pytest.mark.parametrize("scale", [255.0, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_attention_does_not_follow_the_batchs_size(scale, count, alike, weights, reduction):
    # With a fused kernel up to 151 times the claim behind a plain mean, and 1.25 times with a sum.
    layer = nn.MultiheadAttention if weights else nn.TransformerEncoderLayer
    check_attention(layer, scale, count, alike=alike, reduction=reduction)


@DTYPES
@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_softmax_layer_passes_on_what_torchs_own_does(dtype, dim, inplace):
    model = with_softmax(dim).to(dtype)
    plain = copy.deepcopy(model)
    trainer = Trainer(
        model, (4,), layerwise(bound="exact", max_input_norm=None), max_grad_norm=1e6,
        dtype=dtype,
    )  # fmt: skip
    x, _ = _equal_rows(5)
    x, weights = x.to(dtype), torch.randn(6, 2, 4, dtype=dtype)

    def loss(output: Tensor) -> Tensor:
        if inplace:
            output = (output * 1).mul_(2)
        return (weights * output).sum() / len(output)

    loss(trainer.model(x)).backward()
    trainer.optimizer.step()
    loss(plain(x)).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.summed_grad, len(x) * q.grad)


def test_a_softmax_layer_that_is_not_torchs_own_keeps_its_backward_pass():
    class Sharp(nn.Softmax):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(3 * x)

    for layer in (Sharp(-1), nn.Softmax(-1)):
        model = nn.Sequential(nn.Linear(4, 8), layer)
        if type(layer) is nn.Softmax:
            layer.forward = lambda x: 2 * x
        trainer = Trainer(model, (4,), layerwise(), max_grad_norm=1e6)
        x = torch.randn(3, 4).double()
        y = trainer.model(x)
        (y.square().sum() / 3).backward()
        trainer.optimizer.step()
        assert joint({"0": torch.cat([p.summed_grad.flatten() for p in model.parameters()])}).any()


@pytest.mark.parametrize("bias", [2.0, 8.0, 10.0, 12.0])
def test_a_confident_softmax_layer_keeps_its_gradient(bias):
    # Nothing cancels there: taken for rounding, 0.54 to 0.98 of it was lost.
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 3), nn.Softmax(1))
    with torch.no_grad():
        plain[0].bias.copy_(torch.tensor([bias, 0, 0]))
    x, target = torch.randn(16, 5), torch.eye(3)[[1] * 16]

    def brier(output: Tensor, target: Tensor, _: str = "mean") -> Tensor:
        return (output - target.to(output)).square().sum(dim=1).mean()

    exact = copy.deepcopy(plain).double()
    brier(exact(x.double()), target).backward()
    trainer = Trainer(
        plain, (5,), layerwise(bound="exact", max_input_norm=None), max_grad_norm=1e6,
        loss=brier, dtype=torch.float32,
    )  # fmt: skip
    found = joint(trainer.released(x, target)).double() / len(x)
    expected = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert (found - expected).norm() <= 2e-3 * expected.norm()
