"""Search for a violation with several views of each example; show the bound tight and exact."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, FoldViews, clip_inputs
from opacus_bpclip.rules import GroupNormRule
from opacus_bpclip.rules.views import GroupNormOverViews, over_views
from tests.budgets import layerwise
from tests.checks import (
    Trainer,
    check_independence,
    check_sensitivity,
    check_silent,
    joint,
)
from tests.joint.helpers import ATTAINED, own_gradients, released
from tests.mutants.registry import clipped_around_the_layer
from tests.strategies import BOUNDS, MODES
from tests.views.viewed import Viewed, viewed
from tests.worst_cases import WORST_CASES, spike_upstream

ALLOCATIONS = pytest.mark.parametrize("allocation", ["joint", "equal"])


@settings(max_examples=150)
@given(viewed())
def test_one_example_moves_the_sum_by_at_most_its_sensitivity(
    case: tuple[Trainer, Tensor, Tensor],
) -> None:
    check_sensitivity(*case)


@settings(max_examples=80)
@given(viewed(torch.float32))
def test_the_bound_holds_in_float32_at_every_scale(case: tuple[Trainer, Tensor, Tensor]) -> None:
    check_sensitivity(*case)


@settings(max_examples=80)
@given(viewed())
def test_a_batch_sums_what_its_examples_contribute_alone(
    case: tuple[Trainer, Tensor, Tensor],
) -> None:
    check_independence(*case)


@pytest.mark.parametrize(("bound", "normalize"), MODES)
@ALLOCATIONS
@pytest.mark.parametrize(
    "kind",
    [
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding),
        *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm2d),
    ],
    ids=lambda kind: kind.__name__,
)
def test_equal_views_reach_the_bound(
    kind: type[nn.Module], allocation: str, bound: str, normalize: bool
) -> None:
    torch.manual_seed(0)
    worst, views = WORST_CASES[kind], 3
    model, x = worst.make().double(), worst.example
    target = spike_upstream(model, x, 1e6, worst.output)
    clipping = BackpropClipping(
        allocation=allocation, bound=bound, normalize=normalize, max_input_norm=3.0
    )
    trainer = Viewed(model, worst.shape, clipping, views=views, max_grad_norm=2.0)
    x = x.unsqueeze(1).repeat(1, views, *(1,) * len(worst.shape))
    target = target.unsqueeze(-1).repeat(1, 1, views).flatten(1)
    assert ATTAINED * 2.0 <= joint(trainer.released(x, target)).norm() <= 2.0


def network() -> nn.Sequential:
    """Layers of all kinds that have a rule for several rows, and one that has none."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.PReLU(),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(2),
        nn.Linear(16, 5),
        nn.LayerNorm(5),
        nn.Flatten(),
        nn.Linear(15, 3, bias=False),
    ).double()


def of_views(model: nn.Module, x: Tensor, target: Tensor, limit: float) -> Tensor:
    """Return the clipped sum of the examples' gradients by plain autograd, view after view."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for views, own in zip(x, target.unflatten(1, (3, -1)), strict=True):
        each = [
            own_gradients(model, views[k : k + 1], own[None, :, k])[0] for k in range(len(views))
        ]
        mean = torch.stack(each).mean(dim=0)
        total += mean * min(1.0, limit / float(mean.norm()))
    return total


AROUND = pytest.mark.parametrize("around", [False, True], ids=["closed forms", "own autograd"])


@AROUND
@pytest.mark.parametrize("max_input_norm", [None, 1.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sum_is_that_of_clipped_means_over_the_views(
    monkeypatch: pytest.MonkeyPatch, reduction: str, max_input_norm: float | None, around: bool
) -> None:
    if around:
        clipped_around_the_layer(monkeypatch)
    model, views = network(), 4
    if max_input_norm is not None:
        model = nn.Sequential(*[own for own in model if not isinstance(own, nn.PReLU)])
    alone = copy.deepcopy(model)
    if max_input_norm is not None:
        clip_inputs(alone, max_input_norm)
    x = torch.randn(5, views, 2, 4, 4).double()
    target = torch.randn(5, 3 * views).double() * torch.tensor([[0.01, 0.1, 0.5, 3, 9]]).T
    trainer = Viewed(
        model,
        (2, 4, 4),
        BackpropClipping(max_input_norm=max_input_norm),
        views=views,
        reduction=reduction,
    )
    found = joint(trainer.released(x, target / views))
    expected = of_views(alone, x, target, 1.0)
    assert (found - expected).norm() <= 1e-9 * expected.norm()


@AROUND
@pytest.mark.parametrize("bound", BOUNDS)
@ALLOCATIONS
def test_the_bounds_hold_for_every_kind_of_layer(
    monkeypatch: pytest.MonkeyPatch, allocation: str, bound: str, around: bool
) -> None:
    if around:
        clipped_around_the_layer(monkeypatch)
    model = nn.Sequential(*[own for own in network() if not isinstance(own, nn.PReLU)])
    trainer = Viewed(
        model, (2, 4, 4), layerwise(bound=bound, allocation=allocation), views=3, max_grad_norm=0.7
    )
    for scale in (1e-3, 1.0, 1e3):
        x = torch.randn(3, 3, 2, 4, 4).double()
        target = scale * torch.randn(3, 9).double()
        check_sensitivity(trainer, x, target)
        check_independence(trainer, x, target)


def test_rows_are_normalised_as_by_the_rule_for_one() -> None:
    layer = nn.GroupNorm(2, 4).double()
    one = GroupNormRule.from_module(layer)
    rule = over_views(one)
    assert isinstance(rule, GroupNormOverViews)
    x, g = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    for view in range(3):
        dx = rule.input_gradient(g, x, layer.weight)[:, view]
        assert torch.allclose(dx, one.input_gradient(g[:, view], x[:, view], layer.weight))
        assert torch.equal(rule.normalized(x)[:, view], one.normalized(x[:, view]))
    assert rule.largest(x) == one.largest(x[:, 0])


@settings(max_examples=60)
@given(st.data())
def test_one_view_is_what_the_model_alone_is(data: st.DataObject) -> None:
    bound = data.draw(st.sampled_from(BOUNDS))
    allocation = data.draw(st.sampled_from(["joint", "equal"]))
    clipping = layerwise(bound=bound, allocation=allocation)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    )
    x, target = torch.randn(3, 2, 5).double(), 3 * torch.randn(3, 2).double()
    plain = released(Trainer(copy.deepcopy(model), (2, 5), clipping), x, target)
    own = released(Viewed(model, (2, 5), clipping, views=1), x.unsqueeze(1), target)
    assert (plain - own).norm() <= 1e-12


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("where", ["input", "target"])
@ALLOCATIONS
def test_an_example_with_a_view_that_is_not_finite_contributes_nothing(
    allocation: str, where: str, bound: str
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    trainer = Viewed(model, (1, 5, 5), layerwise(bound=bound, allocation=allocation), views=2)
    x = torch.randn(4, 2, 1, 5, 5, dtype=torch.float64)
    target = torch.randn(4, 4, dtype=torch.float64)
    (x if where == "input" else target)[-1].view(-1)[1] = float("nan")
    check_silent(trainer, x, target)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.LayerNorm, nn.Embedding, nn.GroupNorm])
@ALLOCATIONS
def test_evaluation_mode_in_the_backward_pass_changes_nothing(
    kind: type[nn.Module], allocation: str
) -> None:
    torch.manual_seed(0)
    worst = WORST_CASES[kind]
    model, x = worst.make().double(), worst.example
    trainer = Viewed(model, worst.shape, BackpropClipping(allocation=allocation), views=3)
    target = spike_upstream(model, x, 1e6, worst.output)
    x = x.unsqueeze(1).repeat(1, 3, *(1,) * len(worst.shape))
    target = target.unsqueeze(-1).repeat(1, 1, 3).flatten(1)
    before = joint(trainer.released(x, target))
    trainer.optimizer.zero_grad()
    loss = trainer.loss(trainer.model(x), target, "mean")
    trainer.model.eval()
    loss.backward()
    trainer.optimizer.step()
    assert torch.equal(torch.cat([p.summed_grad.flatten() for p in model.parameters()]), before)


def test_input_clipping_scales_each_view_as_evaluation_does() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 2)).double()
    private = Viewed(inner, (1, 5, 5), layerwise(max_input_norm=0.5), views=3).model
    assert isinstance(private._module, FoldViews)
    x = torch.randn(4, 3, 1, 5, 5).double() * torch.tensor([0.01, 1, 30.0]).view(3, 1, 1, 1)
    trained = private(x)
    private.eval()
    for view in range(3):
        assert torch.allclose(private(x[:, view]), trained[..., view], rtol=1e-12)
    # A model that is taken out of the fold goes on to clip its inputs.
    private.cleanup()
    assert torch.allclose(inner(x[:3, 2]), trained[:3, :, 2], rtol=1e-12)
