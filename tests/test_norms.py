"""The bounds as functions of tensors: never below the norm, ordered, equal to a naive sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opacus_bpclip.rules import ConvRule, exact_norms, norms, precision
from tests.strategies import seeds

EVERY_KIND = [(True, True), (True, False), (False, True)]


@st.composite
def products(draw, dtype=torch.float64, exponents=None):
    generator = torch.Generator().manual_seed(draw(seeds))
    batch, groups = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    channels, inputs, positions = (draw(st.integers(1, 6)) for _ in range(3))
    exponent = st.integers(-30, 30) if exponents is None else exponents

    def factor(rows):
        values = torch.randn(
            batch, groups, rows, positions, dtype=torch.float64, generator=generator
        )
        # Positions that repeat or cancel are where the bounds differ most.
        kind = draw(st.sampled_from(["random", "equal", "cancel", "zero"]))
        if kind == "equal":
            values = values[..., :1].expand_as(values)
        elif kind == "cancel":
            signs = torch.tensor([(-1.0) ** p for p in range(positions)], dtype=torch.float64)
            values = values[..., :1] * signs
        return (values * 0.0 if kind == "zero" else values) * 10.0 ** draw(exponent)

    return factor(channels).to(dtype), factor(inputs).to(dtype)


def _truth(g, u, *, weight, bias):
    g, u = g.double(), u.double()
    squares = torch.zeros(g.shape[:2], dtype=torch.float64)
    if weight:
        squares = squares + (g @ u.transpose(-1, -2)).square().sum((2, 3))
    if bias:
        squares = squares + g.sum(-1).square().sum(2)
    return squares.sum(1).sqrt()


def _input_norms(u):
    dtype = precision.norm_dtype(u.dtype)
    length = torch.linalg.vector_norm(u, dim=2, dtype=dtype)
    return length + norms.underflow(u.shape[2], dtype)


def _exact(g, u, columns, *, weight, bias):
    """Through the rule; the columns of a 1x1 convolution are ``u``."""
    rule = ConvRule(
        weight=weight,
        bias=bias,
        groups=g.shape[1],
        group_channels=u.shape[2],
        kernel=(1,),
        stride=(1,),
        dilation=(1,),
        padding=(0, 0),
        padding_mode="constant",
    )
    return rule.exact_bound(g, u.flatten(1, 2), columns)


def _all_bounds(g, u, *, weight, bias):
    columns = norms.column_norms(_input_norms(u), weight=weight, bias=bias)
    largest = float(_input_norms(u).max()) if u.numel() else 1.0
    return {
        "product": norms.product_bound(g, norms.max_column_norm(largest, weight=weight, bias=bias)),
        "weighted": norms.weighted_bound(g, columns),
        "exact": _exact(g, u, columns, weight=weight, bias=bias),
    }


@pytest.mark.parametrize(("weight", "bias"), EVERY_KIND)
@given(case=products())
def test_every_bound_covers_the_gradient_and_each_is_tighter_than_the_last(case, weight, bias):
    g, u = case
    truth = _truth(g, u, weight=weight, bias=bias)
    bounds = _all_bounds(g, u, weight=weight, bias=bias)
    assert (bounds["exact"] * (1 + 1e-13) >= truth).all()
    # The slack against vanishing squares differs between the three; no real bound is this small.
    vanishing = 1e-40
    assert (bounds["weighted"] * (1 + 1e-7) + vanishing >= bounds["exact"]).all()
    assert (bounds["product"] * (1 + 1e-9) + vanishing >= bounds["weighted"]).all()


@pytest.mark.parametrize(("weight", "bias"), EVERY_KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
def test_a_finite_bound_covers_the_gradient_in_lower_precision(data, dtype, weight, bias):
    exponents = st.integers(-4, 3) if dtype == torch.float16 else st.integers(-30, 30)
    g, u = data.draw(products(dtype, exponents))
    truth = _truth(g, u, weight=weight, bias=bias)
    margin = precision.rounding_margin(dtype, g.device)
    for name, bound in _all_bounds(g, u, weight=weight, bias=bias).items():
        bound = bound.double()
        assert (~bound.isfinite() | (bound * (1 + margin) >= truth)).all(), name


@given(products(exponents=st.just(0)), st.booleans())
def test_gram_matrix_and_own_gradient_agree(case, bias):
    g, u = case
    square, length = exact_norms._gram_square(g, u, weight=True, bias=bias)
    direct = exact_norms._direct_norm(g, u, weight=True, bias=bias)
    assert torch.allclose(square, direct.square(), rtol=1e-9, atol=1e-12)
    assert torch.allclose(length, torch.linalg.vector_norm(g, dim=(2, 3)))


@pytest.mark.parametrize(
    ("positions", "channels", "inputs", "cheaper"),
    [(2, 512, 512, True), (64, 256, 256, True), (1024, 16, 16, False), (64, 8, 8, False)],
)
def test_the_cheaper_way_to_the_exact_norm_is_chosen(positions, channels, inputs, cheaper):
    chosen = exact_norms.gram_is_cheaper(positions, channels, inputs)
    assert chosen is cheaper


@pytest.mark.parametrize(
    ("positions", "channels", "inputs", "cheaper"),
    [(2, 512, 512, False), (64, 256, 256, True), (64, 256, 2304, False), (256, 128, 1152, True)],
)
def test_what_is_added_up_anyway_is_made_earlier(positions, channels, inputs, cheaper):
    assert exact_norms.own_is_cheaper(positions, channels, inputs) is cheaper


def test_what_may_vanish_of_an_own_gradient_is_in_its_bound():
    size, positions = 2048, 150
    assert exact_norms.own_is_cheaper(positions, size, size)
    columns = torch.full((1, 1, positions), norms.smallest_column(torch.float32))
    g = torch.zeros(1, 1, size, positions)
    bound = exact_norms.own_bound(torch.zeros(1, 1), g, columns, inputs=size, slack=1e-5)
    # The square of each entry just below the smallest normal number.
    assert float(bound) >= (size * size * torch.finfo(torch.float32).tiny) ** 0.5


@pytest.mark.parametrize("positions", [1, 64, 4096])
@pytest.mark.parametrize("inputs", [16, 4096])
def test_a_chunk_of_examples_stays_under_the_memory_cap(positions, inputs):
    per_example = exact_norms.exact_bytes(positions, 1, 64, inputs, torch.float32)
    assert per_example >= 4 * (positions * (inputs + 64) + min(64 * inputs, 2 * positions**2))
    chunk = exact_norms.exact_chunk(per_example, torch.device("cpu"))
    assert chunk >= 1
    assert chunk == 1 or chunk * per_example <= exact_norms.EXACT_MEMORY_CAP
    assert exact_norms.exact_chunk(per_example, torch.device("cuda")) >= chunk


def test_the_bias_counts_in_the_largest_column():
    assert norms.max_column_norm(3.0, weight=True, bias=True) == 10**0.5
    assert norms.max_column_norm(3.0, weight=True, bias=False) == 3.0
    assert norms.max_column_norm(3.0, weight=False, bias=True) == 1.0
