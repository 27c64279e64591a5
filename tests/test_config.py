"""The public options: what is accepted, and the words with which the rest is refused."""

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opacus_bpclip import AdaptiveThreshold, BackpropClipping, ThresholdSchedule
from opacus_bpclip.config import is_positive_number


def test_defaults_are_the_documented_ones() -> None:
    assert BackpropClipping() == BackpropClipping(
        allocation="joint", bound="exact", max_input_norm=None, normalize=False, uses="auto"
    )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(BackpropClipping)])
def test_options_are_frozen(name: str) -> None:
    config = BackpropClipping()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"bound": "tight"},
            "Expected bound='tight' to be one of 'product', 'weighted', 'exact'.",
            id="unknown bound",
        ),
        pytest.param(
            {"bound": None},
            "Expected bound=None to be one of 'product', 'weighted', 'exact'.",
            id="no bound",
        ),
        pytest.param(
            {"bound": ["exact"]},
            "Expected bound=['exact'] to be one of 'product', 'weighted', 'exact'.",
            id="list of bounds",
        ),
        pytest.param(
            {"normalize": "yes"},
            "Expected normalize='yes' to be True or False.",
            id="normalize",
        ),
        pytest.param(
            {"stability": 0.0},
            "Expected stability=0.0 to be a finite number > 0.",
            id="no stability",
        ),
        pytest.param(
            {"propagate": "scaled"},
            "Expected propagate='scaled' to be one of 'clipped', 'unclipped'.",
            id="propagate",
        ),
        pytest.param(
            {"allocation": "fair"},
            "Expected allocation='fair' to be one of 'joint', 'equal', 'dimension' or a mapping.",
            id="unknown allocation",
        ),
        pytest.param(
            {"allocation": [0.5, 0.5]},
            "Expected allocation=[0.5, 0.5] to be one of 'joint', 'equal', 'dimension' or a "
            "mapping.",
            id="allocation without names",
        ),
        pytest.param(
            {"allocation": {"a": 0.0}},
            "Expected allocation['a']=0.0 to map a module's name to a finite number > 0.",
            id="share of zero",
        ),
        pytest.param(
            {"allocation": {"a": 1.0, "b": math.nan}},
            "Expected allocation['b']=nan to map a module's name to a finite number > 0.",
            id="share of nan",
        ),
        pytest.param(
            {"allocation": {3: 1.0}},
            "Expected allocation[3]=1.0 to map a module's name to a finite number > 0.",
            id="share of no name",
        ),
        pytest.param(
            {"bound": "product", "max_input_norm": None},
            'bound="product" needs max_input_norm: the bound is max_input_norm times a norm of '
            'the upstream gradient. Set max_input_norm, or choose bound="weighted" or "exact".',
            id="product of unclipped inputs",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  the whole text is compared
        BackpropClipping(**options)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "value",
    [0, -1.0, math.nan, math.inf, True, "3", [3.0], pytest.param(10**400, id="beyond any float")],
)
def test_max_input_norm_must_be_a_finite_number_above_zero(value: Any) -> None:
    with pytest.raises(ValueError, match="Expected max_input_norm=") as refusal:
        BackpropClipping(max_input_norm=value)
    assert str(refusal.value) == (
        f"Expected max_input_norm={value!r} to be a finite number > 0, or None."
    )


@pytest.mark.parametrize("bound", ["weighted", "exact"])
def test_inputs_may_stay_unclipped_where_the_bound_measures_them(bound: Any) -> None:
    assert BackpropClipping(bound=bound, max_input_norm=None).max_input_norm is None


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_grad_norm'"):
        BackpropClipping(max_grad_norm=1.0)  # type: ignore[call-arg]


def test_a_mapping_is_copied_and_cannot_be_changed_later() -> None:
    shares = {"a": 1.0}
    config = BackpropClipping(allocation=shares)
    shares["a"] = 5.0
    assert config.allocation == {"a": 1.0}
    with pytest.raises(TypeError):
        config.allocation["a"] = 5.0  # type: ignore[index]


def test_equal_mappings_make_equal_options() -> None:
    assert BackpropClipping(allocation={"a": 1.0}) == BackpropClipping(allocation={"a": 1.0})
    assert BackpropClipping(allocation={"a": 1.0}) != BackpropClipping(allocation={"a": 2.0})
    twice = {BackpropClipping(allocation={"a": 1.0, "b": 2.0}) for _ in range(2)}
    assert twice == {BackpropClipping(allocation={"b": 2.0, "a": 1.0})}


@pytest.mark.parametrize("allocation", ["equal", {"0": 1.0, "2": 3.0}], ids=["name", "mapping"])
@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda config: pickle.loads(pickle.dumps(config)), id="pickle"),
        pytest.param(lambda config: BackpropClipping(**dataclasses.asdict(config)), id="asdict"),
        pytest.param(lambda config: dataclasses.replace(config, bound="exact"), id="replace"),
    ],
)
def test_options_survive_copying(allocation: Any, duplicate: Any) -> None:
    config = BackpropClipping(bound="exact", allocation=allocation)
    assert duplicate(config) == config


@given(st.floats() | st.integers())
def test_positive_numbers_are_those_above_zero_and_finite(value: float) -> None:
    assert is_positive_number(value) == (0 < value < math.inf)


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (AdaptiveThreshold, {"target_unclipped_quantile": 1.0}, "a number between 0 and 1"),
        (AdaptiveThreshold, {"clipbound_learning_rate": 0}, "clipbound_learning_rate=0 to be"),
        (AdaptiveThreshold, {"count_noise": 0.5}, "count_noise=0.5 to be > 0.5 and at most"),
        (AdaptiveThreshold, {"ramp_steps": 1.5}, "ramp_steps=1.5 to be an integer >= 0"),
        (AdaptiveThreshold, {"initial": 0.01}, "initial=0.01 to be between min_clipbound=0.02"),
        (AdaptiveThreshold, {"min_clipbound": 1e-30}, "min_clipbound=1e-30 to be from 1e-12 to"),
        (ThresholdSchedule, {"initial": 1e300, "final": 1, "steps": 1}, r"initial=1e\+300 to be"),
        (ThresholdSchedule, {"initial": 1, "final": 0, "steps": 1}, "final=0 to be"),
        (ThresholdSchedule, {"initial": 1, "final": 1, "steps": 0}, "steps=0 to be an integer"),
        (BackpropClipping, {"threshold": 1.0}, "threshold=1.0 to be an AdaptiveThreshold, a"),
        (
            BackpropClipping,
            {"threshold": AdaptiveThreshold(), "normalize": True},
            "a threshold would change nothing. Set one of the two",
        ),
        (BackpropClipping, {"layer_noise": "dimension"}, 'Set allocation="equal", or layer_noise'),
        (BackpropClipping, {"allocation": "equal", "layer_noise": "less"}, "'dimension' or a map"),
        (
            BackpropClipping,
            {"allocation": "equal", "layer_noise": {"a": 0}},
            r"layer_noise\['a'\]=0 to map a module's name to a finite number > 0",
        ),
    ],
)
def test_thresholds_and_noise_are_validated(make, options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


def test_noise_far_beyond_a_batch_leaves_the_threshold_between_its_ends():
    policy = AdaptiveThreshold()
    assert policy.following(1.0, -1e9, 0) == policy.max_clipbound
    assert policy.following(1.0, 1e9, 0) == policy.min_clipbound
