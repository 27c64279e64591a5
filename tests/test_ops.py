"""The two primitives on their own."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip.clipping.ops import clip_input, clip_upstream, scale_input
from opacus_bpclip.rules import RULES, exact_norms
from tests import reference
from tests.strategies import BOUNDS, MODES, hostile_batches, product_cases


def _rule(layer):
    return RULES[type(layer)].from_module(layer)


def _limit(value):
    return torch.tensor(value, dtype=torch.float64)


@given(st.data(), st.sampled_from([0.1, 1.0, 7.0]))
def test_every_column_of_a_clipped_input_is_within_the_norm(data, max_norm):
    case = data.draw(product_cases)
    layer = case.layer.double()
    x = data.draw(hostile_batches(case.shape))
    clipped = clip_input((x,), _rule(layer), max_norm)
    for i, row in enumerate(x):
        if not row.isfinite().all():
            assert not clipped.finite[i]
            assert not clipped.inputs[0][i].any()
            continue
        columns = reference.column_norms(layer, clipped.inputs[0][i : i + 1])
        assert (columns <= max_norm).all()
        assert torch.allclose(clipped.norms[i], columns, rtol=1e-9, atol=1e-140)
        before = reference.column_norms(layer, x[i : i + 1])
        if (before <= max_norm * (1 - 1e-12)).all():
            assert torch.equal(clipped.inputs[0][i], row)


def test_evaluation_and_training_clip_alike():
    rule = _rule(nn.Linear(4, 2))
    x = torch.randn(5, 3, 4) * 10
    assert torch.equal(scale_input((x,), rule, 1.0)[0], clip_input((x,), rule, 1.0).inputs[0])


def test_the_clip_factor_is_a_constant_in_the_backward_pass():
    x = (torch.randn(3, 4, dtype=torch.float64) * 10).requires_grad_()
    clip_input((x,), _rule(nn.Linear(4, 2)), 1.0).inputs[0].sum().backward()
    factor = 1.0 / x.detach().norm(dim=1, keepdim=True)
    assert torch.allclose(x.grad, factor.expand_as(x), rtol=1e-9)


@pytest.mark.parametrize(("bound", "upstream"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_limit_holds_for_the_numbers_that_are_summed_in_low_precision(bound, upstream, dtype):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 8)
    rule = _rule(layer)
    x = torch.randn(200, 12, 16, generator=generator).to(dtype)
    g = (torch.randn(200, 12, 8, generator=generator) * 5).to(dtype)
    clipped = clip_input((x,), rule, 2.0)
    y = torch.zeros(200, 12, 8, dtype=dtype, requires_grad=True)
    out = clip_upstream(y, clipped, rule, _limit(1.0), bound=bound, upstream=upstream, max_norm=2.0)
    out.backward(g)
    weight = torch.einsum("bpo,bpi->boi", y.grad.double(), clipped.inputs[0].double())
    bias = y.grad.double().sum(1)
    norm = torch.cat([weight.flatten(1), bias], dim=1).norm(dim=1)
    assert (norm <= 1.0).all()
    assert norm.max() >= (0.9 if bound == "exact" else 0.1)


@pytest.mark.parametrize("bound", BOUNDS)
def test_nan_and_inf_rows_are_nan_forward_and_zero_backward(bound):
    rule = _rule(nn.Linear(2, 2))
    x = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    clipped = clip_input((x,), rule, 3.0)
    y = torch.ones(3, 2, requires_grad=True)
    out = clip_upstream(y * 1.0, clipped, rule, _limit(9.0), bound=bound, max_norm=3.0)
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()
    out.backward(torch.ones(3, 2))
    assert y.grad[0].all()
    assert not y.grad[1:].any()


@pytest.mark.parametrize(("bound", "upstream"), MODES)
def test_in_place_activations_may_follow(bound, upstream):
    def gradient(inplace):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        clipped = clip_input((torch.randn(5, 2, 4),), _rule(layer), 1.0)
        y = clip_upstream(
            layer(clipped.inputs[0]),
            clipped,
            _rule(layer),
            _limit(0.1),
            bound=bound,
            upstream=upstream,
            max_norm=1.0,
        )
        nn.ReLU(inplace=inplace)(y).sum().backward()
        return layer.weight.grad

    assert torch.equal(gradient(True), gradient(False))


class _Clipped(nn.Module):
    """The primitives around a layer, as the hooks put them."""

    def __init__(self, layer, bound, upstream):
        super().__init__()
        self.layer, self.bound, self.upstream = layer, bound, upstream
        self.rule, self.limit = _rule(layer), _limit(0.5)

    def forward(self, x):
        clipped = clip_input((x,), self.rule, 2.0, mean=True)
        y = clip_upstream(
            self.layer(clipped.inputs[0]),
            clipped,
            self.rule,
            self.limit,
            bound=self.bound,
            upstream=self.upstream,
            max_norm=2.0,
            mean=True,
        )
        return torch.relu_(y)


@pytest.mark.parametrize(
    ("bound", "upstream"), [*((bound, "clip") for bound in BOUNDS), ("exact", "normalize")]
)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3), (4,)),
        (nn.Linear(4, 3), (5, 4)),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, padding_mode="circular"), (2, 7, 6)),
    ],
    ids=["linear", "sequence", "conv"],
)
def test_the_primitives_trace_without_a_graph_break(layer, shape, bound, upstream):
    torch._dynamo.reset()
    eager = _Clipped(copy.deepcopy(layer), bound, upstream)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    # Another batch size and another limit must not need another graph to be right.
    for batch, limit in ((6, 0.5), (3, 0.5), (3, 0.01)):
        x = torch.randn(batch, *shape) * 3
        for model in (eager, compiled):
            model.limit.fill_(limit)
            model.zero_grad()
            model(x).sum().backward()
        got = compiled.layer.weight.grad
        assert torch.allclose(got, eager.layer.weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bound", BOUNDS)
def test_an_empty_batch_gives_zero_gradients(bound):
    layer = nn.Conv2d(1, 2, 3)
    clipped = clip_input((torch.zeros(0, 1, 5, 5),), _rule(layer), 1.0)
    out = clip_upstream(
        layer(clipped.inputs[0]), clipped, _rule(layer), _limit(1.0), bound=bound, max_norm=1.0
    )
    out.sum().backward()
    assert not layer.weight.grad.any()


def test_exact_works_in_chunks_and_gives_the_same(monkeypatch):
    layer = nn.Conv2d(2, 3, 3)
    rule = _rule(layer)
    x, g = torch.randn(7, 2, 6, 6), torch.randn(7, 3, 4, 4)
    measured = rule.measure(x)
    whole = rule.bound("exact", g, (x,), measured.norms, None)
    monkeypatch.setattr(exact_norms, "EXACT_MEMORY_CAP", 1)
    assert exact_norms.exact_chunk(2, x.device) == 1
    assert torch.allclose(rule.bound("exact", g, (x,), measured.norms, None), whole, rtol=1e-6)


@given(st.integers(1, 5), st.sampled_from(BOUNDS), st.sampled_from([None, 1.0]))
def test_a_mean_is_undone_for_the_layer_alone(count, bound, max_norm):
    layer = nn.Linear(4, 2).double()
    torch.manual_seed(count)
    x, g = torch.randn(count, 4).double(), torch.randn(count, 2).double() * 10
    found = []
    for mean in (False, True):
        leaf = x.clone().requires_grad_()
        norm = max_norm or (1.0 if bound == "product" else None)
        clipped = clip_input((leaf,), _rule(layer), norm, mean=mean)
        y = clip_upstream(
            layer(clipped.inputs[0]),
            clipped,
            _rule(layer),
            _limit(1.0),
            bound=bound,
            max_norm=norm,
            mean=mean,
        )
        arriving = g / count if mean else g
        found.append(torch.autograd.grad(y, [layer.weight, leaf], arriving))
    (weight, flow), (weight_of_mean, flow_of_mean) = found
    assert torch.allclose(weight_of_mean, weight, rtol=1e-12)
    assert torch.allclose(flow_of_mean, flow / count, rtol=1e-12)
