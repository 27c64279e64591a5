"""``max_grad_norm`` over the layers: the parts always add up to the whole, and to no more."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_bpclip import CoverageError
from opacus_bpclip.clipping.allocation import layer_fractions

sizes_strategy = st.dictionaries(
    st.text("abc.0123", min_size=1, max_size=6), st.integers(1, 10**12), min_size=1, max_size=40
)


def noise_to_signal(sizes: dict[str, int], fractions: dict[str, float]) -> float:
    return sum(size / fractions[name] ** 2 for name, size in sizes.items())


@given(sizes_strategy, st.sampled_from(["equal", "dimension"]))
def test_squares_sum_to_one(sizes: dict[str, int], allocation: str) -> None:
    fractions = layer_fractions(sizes, allocation)
    assert list(fractions) == list(sizes)
    assert abs(math.fsum(part**2 for part in fractions.values()) - 1) <= 1e-15 * len(sizes)


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=40))
def test_squares_of_a_mapping_sum_to_one_at_any_scale(shares: list[float]) -> None:
    allocation = {str(index): share for index, share in enumerate(shares)}
    fractions = layer_fractions(dict.fromkeys(allocation, 1), allocation)
    assert abs(math.fsum(part**2 for part in fractions.values()) - 1) <= 1e-15 * len(shares)


def test_equal_gives_every_layer_the_same_part() -> None:
    fractions = layer_fractions({"a": 1, "b": 10**6, "c": 5}, "equal")
    assert set(fractions.values()) == {math.sqrt(1 / 3)}


def test_dimension_gives_the_fourth_root_of_the_size() -> None:
    fractions = layer_fractions({"small": 1, "large": 16}, "dimension")
    assert fractions["large"] / fractions["small"] == pytest.approx(2)


@given(sizes_strategy, st.integers(0, 2**32 - 1))
def test_dimension_minimises_the_noise_to_signal_power(sizes: dict[str, int], seed: int) -> None:
    best = noise_to_signal(sizes, layer_fractions(sizes, "dimension"))
    # Source: at the optimum, d / (sqrt(d) / sum of sqrt(d)) sums to (sum of sqrt(d)) squared.
    assert best == pytest.approx(math.fsum(math.sqrt(size) for size in sizes.values()) ** 2)
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(sizes))) + 1e-12
    competitor = layer_fractions(sizes, dict(zip(sizes, shares.tolist(), strict=True)))
    assert best <= noise_to_signal(sizes, competitor) * (1 + 1e-9)


def test_a_mapping_holds_shares_of_the_squared_sensitivity() -> None:
    fractions = layer_fractions({"a": 7, "b": 7}, {"b": 3.0, "a": 1.0})
    assert list(fractions) == ["a", "b"]
    assert fractions["a"] ** 2 == pytest.approx(0.25)
    assert fractions["b"] ** 2 == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("allocation", "problem"),
    [
        pytest.param({"a": 1.0}, "; no share for: b", id="missing"),
        pytest.param({}, "; no share for: a, b", id="empty"),
        pytest.param({"a": 1.0, "b": 1.0, "z": 1.0, "y": 1.0}, "; no such layer: y, z", id="extra"),
        pytest.param({"a": 1.0, "c": 1.0}, "; no such layer: c; no share for: b", id="misspelt"),
    ],
)
def test_a_mapping_must_name_exactly_the_layers(allocation: dict[str, float], problem: str) -> None:
    with pytest.raises(CoverageError) as refusal:
        layer_fractions({"a": 1, "b": 2}, allocation)
    assert str(refusal.value) == (
        f"allocation does not match the model's trainable layers{problem}. "
        "Give a share to each of: a, b."
    )
