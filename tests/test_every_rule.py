"""For each class of layers: search for violations, attainment, comparison with autograd."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from opacus_bpclip.model.coverage import examine
from opacus_bpclip.rules import RULES, FunctionRule, registered_kind
from tests.budgets import layerwise
from tests.checks import Trainer, check_sensitivity, check_silent, joint
from tests.followed import check_followed
from tests.strategies import (
    BOUNDS,
    CASES,
    MODES,
    NO_EMPTY_BATCH,
    NORMS,
    accepted,
    clippings,
    hostile_batches,
    hostile_examples,
    scales,
    seed_torch,
    single_layers,
)
from tests.worst_cases import WORST_CASES, spike_upstream

# test_sensitivity.py searches their families in every run; class by class takes another minute.
SEARCHED_AS_FAMILIES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *NORMS)

KINDS = pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)


def test_every_layer_that_opacus_trains_is_searched_here():
    assert set(GradSampleModule.GRAD_SAMPLERS) <= set(CASES) == set(WORST_CASES)


def test_every_rule_is_searched_here():
    # torchvision's are broadcast parameters: tests/test_broadcast.py, tests/test_architectures.py.
    elsewhere = {name for name in RULES if str(name).startswith("torchvision.")}
    searched = {registered_kind(kind)[0] for kind in CASES}
    by_path = {f"{kind.__module__}.{kind.__qualname__}" for kind in searched}
    assert set(RULES) - elsewhere - searched <= by_path


def _outputs(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    with torch.no_grad():
        return model(torch.zeros(1, *shape, dtype=dtype)).numel()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind in SEARCHED_AS_FAMILIES else ())
        for kind in CASES
    ],
    ids=lambda kind: kind.__name__,
)
@given(data=st.data())
def test_one_example_moves_the_sum_by_at_most_its_sensitivity(kind, data):
    draw = data.draw
    case = draw(single_layers(kind))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    reduction = draw(st.sampled_from(["mean", "sum"]))
    trainer = Trainer(
        case.layer,
        case.shape,
        accepted(draw(clippings()), dtype, reduction),
        max_grad_norm=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        reduction=reduction,
        dtype=dtype,
    )
    fewest = 1 if kind in NO_EMPTY_BATCH else 0
    companions = draw(hostile_batches(case.shape, dtype, min_size=fewest))
    x = torch.cat([companions, draw(hostile_examples(case.shape, dtype))[None]])
    seed_torch(draw)
    target = torch.randn(len(x), _outputs(case.layer, case.shape, dtype), dtype=dtype)
    rows = torch.tensor([draw(scales) for _ in range(len(x))], dtype=dtype)
    check_sensitivity(trainer, x, target * rows[:, None])


@given(data=st.data())
def test_a_contribution_is_autograds_gradient_of_the_example_times_one_factor(data):
    _check_against_autograd(data, data.draw(st.sampled_from(list(CASES))))


# As many examples for each class as the test above has for all of them takes minutes.
@pytest.mark.slow
@KINDS
@given(data=st.data())
def test_each_classs_contribution_is_autograds_gradient_times_one_factor(kind, data):
    _check_against_autograd(data, kind)


def _check_against_autograd(data, kind):
    case = data.draw(single_layers(kind))
    limit = data.draw(st.sampled_from([1e-2, 1.0, 1e3]))
    bound = data.draw(st.sampled_from(BOUNDS))
    seed_torch(data.draw)
    model = case.layer.double()
    x = torch.randn(3, *case.shape, dtype=torch.float64)
    target = torch.randn(3, model(x).flatten(1).shape[1], dtype=torch.float64)
    own = [_own_gradient(model, x[i : i + 1], target[i : i + 1]) for i in range(3)]
    # Inputs this small are clipped by no norm but one that the product bound can name.
    clipping = layerwise(bound=bound, max_input_norm=1e6 if bound == "product" else None)
    trainer = Trainer(model, case.shape, clipping, max_grad_norm=limit)
    total = joint(trainer.released(x, target))
    for i, gradient in enumerate(own):
        contribution = joint(trainer.released(x[i : i + 1], target[i : i + 1]))
        factor = float(gradient @ contribution / (gradient @ gradient).clamp(min=1e-300))
        assert torch.allclose(contribution, factor * gradient, rtol=1e-6, atol=1e-9 * limit)
        largest = min(1, limit / float(gradient.norm() + 1e-300))
        assert factor <= largest * (1 + 1e-9)
        if bound == "exact" and gradient.any():
            assert factor == pytest.approx(largest, rel=1e-6)
        total = total - contribution
    assert torch.allclose(total, torch.zeros_like(total), atol=1e-9 * limit)


def _own_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    loss = (model(x).flatten(1) * target).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


@pytest.mark.parametrize(("bound", "normalize"), MODES)
@KINDS
def test_the_named_worst_case_reaches_the_bound(kind, bound, normalize):
    torch.manual_seed(0)
    worst = WORST_CASES[kind]
    model, x = worst.make().double(), worst.example
    target = spike_upstream(model, x, 1e4, worst.output)
    trainer = Trainer(
        model, worst.shape, layerwise(bound=bound, normalize=normalize), max_grad_norm=2.0
    )
    assert 0.999 * 2.0 <= joint(trainer.released(x, target)).norm() <= 2.0


def _trainer(kind: type[nn.Module], bound: str) -> tuple[Trainer, Tensor, Tensor]:
    torch.manual_seed(0)
    worst = WORST_CASES[kind]
    model = worst.make()
    x = torch.randn(4, *worst.shape, dtype=torch.float64)
    target = torch.randn(4, _outputs(model, worst.shape, torch.float32), dtype=torch.float64)
    return Trainer(model, worst.shape, layerwise(bound=bound)), x, target


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "target"])
@KINDS
def test_an_example_that_is_not_finite_contributes_nothing(kind, where, value, bound):
    trainer, x, target = _trainer(kind, bound)
    if where == "input" and kind is nn.Embedding:
        return  # token ids are finite
    (x if where == "input" else target)[-1].view(-1)[-1] = value
    check_silent(trainer, x, target)


@pytest.mark.parametrize("bound", BOUNDS)
@KINDS
def test_an_empty_batch_contributes_nothing(kind, bound):
    trainer, x, target = _trainer(kind, bound)
    if kind in NO_EMPTY_BATCH:
        trainer.optimizer.step()
        assert trainer.optimizer.accumulated_iterations == 1
        return
    assert not joint(trainer.released(x[:0], target[:0])).any()


@KINDS
def test_a_subclass_with_a_forward_of_its_own_is_followed_in_place_of_the_rule(kind):
    def forward(self, *args, **kwargs):
        return 2 * kind.forward(self, *args, **kwargs)

    def made(own: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
        model = WORST_CASES[kind].make()
        layer = next(module for module in model.modules() if isinstance(module, kind))
        layer.__class__ = own
        return model, layer

    own, same = type("Own", (kind,), {"forward": forward}), type("Same", (kind,), {})
    for subclass, followed in ((own, True), (same, False)):
        (found,) = examine(made(subclass)[1])
        assert isinstance(found.rule, FunctionRule) == followed
        assert not found.problems
    torch.manual_seed(0)
    check_followed(lambda: made(own)[0], torch.randn(4, *WORST_CASES[kind].shape).double())


@KINDS
def test_a_model_computes_in_evaluation_what_it_computes_in_training(kind):
    trainer, x, _ = _trainer(kind, "weighted")
    x = x * 10  # beyond what inputs are clipped to
    with torch.no_grad():
        evaluated = trainer.model(x)
    assert torch.allclose(trainer.model(x).detach(), evaluated, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Bilinear, nn.EmbeddingBag], ids=lambda kind: kind.__name__)
def test_a_compiled_layer_gives_the_eager_sum(kind):
    trainer, x, target = _trainer(kind, "exact")
    eager = joint(trainer.released(x, target))
    trainer.model = torch.compile(trainer.model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        # The compiler's own deprecations and hints are not what this test is about.
        warnings.simplefilter("ignore")
        assert torch.allclose(joint(trainer.released(x, target)), eager, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
