"""The joint budget through the real engine: sensitivity, independence, examples not finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import Tensor, nn

from opacus_bpclip import CoverageError, PrivacyViolationError
from tests.checks import (
    Trainer,
    check_independence,
    check_sensitivity,
    check_silent,
    linear_loss,
    squared_loss,
)
from tests.joint.helpers import joint, joint_clippings, outputs_of
from tests.readers import FEATURES, STEPS, Reader
from tests.strategies import (
    BOUNDS,
    CASES,
    MODES,
    NO_EMPTY_BATCH,
    architectures,
    hostile_batches,
    hostile_examples,
    scales,
    seed_torch,
    seeds,
    single_layers,
)


@st.composite
def trained(draw, make, shape, dtype=torch.float64, fewest=0):
    """A private model and a hostile batch whose last example is the one to be added."""
    trainer = Trainer(
        make,
        shape,
        draw(joint_clippings()),
        max_grad_norm=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        reduction=draw(st.sampled_from(["mean", "sum"])),
        loss=draw(st.sampled_from([linear_loss, squared_loss])),
        dtype=dtype,
    )
    companions = draw(hostile_batches(shape, dtype, min_size=fewest))
    x = torch.cat([companions, draw(hostile_examples(shape, dtype))[None]])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    count = outputs_of(trainer.plain, shape)
    target = torch.randn(len(x), count, dtype=dtype, generator=generator)
    rows = torch.tensor([draw(scales) for _ in range(len(x))], dtype=dtype)
    return trainer, x, target * rows[:, None]


@st.composite
def neighbours(draw, dtype=torch.float64):
    case = draw(architectures())
    alone = not any(isinstance(module, NO_EMPTY_BATCH) for module in case.layer.modules())
    return draw(trained(case.layer.to(dtype), case.shape, dtype, 0 if alone else 1))


@settings(max_examples=70)
@given(neighbours())
def test_one_example_moves_the_sum_by_at_most_delta(case):
    assert not case[0].optimizer.layer_sensitivities
    check_sensitivity(*case)


@settings(max_examples=100)
@given(neighbours(dtype=torch.float32))
def test_the_bound_holds_in_float32_at_every_scale(case):
    check_sensitivity(*case)


@settings(max_examples=70)
@given(neighbours())
def test_a_batch_sums_what_its_examples_contribute_alone(case):
    check_independence(*case)


@settings(max_examples=100)
@given(st.data())
def test_the_guarantee_holds_for_every_class_of_layers(data):
    kind = data.draw(st.sampled_from(list(CASES)))
    case = data.draw(single_layers(kind))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    fewest = 1 if kind in NO_EMPTY_BATCH else 0
    check_sensitivity(*data.draw(trained(case.layer.to(dtype), case.shape, dtype, fewest)))


class Shared(nn.Module):
    """Layers of several kinds, each used twice, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.norm = nn.Linear(4, 4), nn.PReLU(), nn.LayerNorm(4)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(self.act(self.body(x)))
            x = x + self.conv(x.unsqueeze(1)).squeeze(1)
        return self.head(x)


class Tied(nn.Module):
    """Two linear layers and two convolutions with one weight each, biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.other = nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 3, stride=2)
        self.right.weight = self.left.weight
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.right(torch.tanh(self.left(x))).unsqueeze(1)
        return torch.cat([self.one(x).flatten(1), self.other(x).flatten(1)], dim=1)


@settings(max_examples=40)
@given(seeds, st.sampled_from([Shared, Tied]), st.data())
def test_uses_and_ties_of_several_kinds_stay_within_delta(seed, kind, data):
    torch.manual_seed(seed)
    case = data.draw(trained(kind().double(), (4,), fewest=1))
    check_sensitivity(*case)
    check_independence(*case)


@st.composite
def readers(draw):
    seed_torch(draw)
    return Reader(
        draw(st.sampled_from([DPRNN, DPLSTM, DPGRU])),
        packed=draw(st.booleans()),
        num_layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
    ).double()


@settings(max_examples=30)
@given(readers(), st.data())
def test_one_sequence_moves_the_sum_by_at_most_delta(reader, data):
    case = data.draw(trained(reader, (STEPS, FEATURES), fewest=int(reader.packed)))
    check_sensitivity(*case)
    check_independence(*case)


class Sides(nn.Module):
    """Layers of every path of the mechanism side by side, so that one alone can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.conv = nn.Conv1d(1, 2, 2)
        self.norm = nn.LayerNorm(4)
        self.act = nn.PReLU()
        self.transposed = nn.ConvTranspose1d(1, 1, 2)
        self.twice = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        channel = x.unsqueeze(1)
        parts = [
            self.linear(x),
            self.conv(channel),
            self.norm(x),
            self.act(x),
            self.transposed(channel),
            self.twice(torch.tanh(self.twice(x))),
        ]
        return torch.cat([part.flatten(1) for part in parts], dim=1)


# Where each layer's outputs are.
PARTS = {"linear": 0, "conv": 4, "norm": 10, "act": 14, "transposed": 18, "twice": 23}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layer", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_an_upstream_gradient_of_one_layer_that_is_not_finite_silences_all(
    layer, value, bound, normalize
):
    trainer = Trainer(Sides(), (4,), joint(bound=bound, normalize=normalize))
    x = torch.randn(4, 4, dtype=torch.float64)
    target = torch.randn(4, 26, dtype=torch.float64)
    # 1e300 is finite, but its square is not.
    target[-1, PARTS[layer]] = value
    check_silent(trainer, x, target)


@pytest.mark.parametrize(("bound", "normalize"), MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_silences_all(value, bound, normalize):
    trainer = Trainer(Sides(), (4,), joint(bound=bound, normalize=normalize))
    x = torch.randn(4, 4, dtype=torch.float64)
    x[-1, 2] = value
    check_silent(trainer, x, torch.randn(4, 26, dtype=torch.float64))


class Inner(nn.Module):
    """A number that is not finite arises between two layers, and only the second one sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.where(x[:, :1] > 9, h / 0, h))


@pytest.mark.parametrize(("bound", "normalize"), MODES)
def test_a_hidden_value_that_is_not_finite_silences_all(bound, normalize):
    trainer = Trainer(Inner(), (3,), joint(bound=bound, normalize=normalize))
    x = torch.randn(4, 3, dtype=torch.float64)
    x[-1, 0] = 10.0
    check_silent(trainer, x, torch.randn(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_sequence_that_is_not_finite_contributes_nothing(bound, packed):
    torch.manual_seed(0)
    trainer = Trainer(Reader(packed=packed), (STEPS, FEATURES), joint(bound=bound))
    x, target = torch.randn(4, STEPS, FEATURES).double(), torch.randn(4, 2).double()
    x[-1, :, 0] = 1.0
    x[-1, 2, 1] = float("nan")
    check_silent(trainer, x, target)


def test_what_an_example_contributes_does_not_depend_on_the_size_of_a_mean():
    torch.manual_seed(0)
    trainer = Trainer(Sides(), (4,), joint(normalize=True))
    x, target = torch.randn(64, 4).double(), torch.randn(64, 26).double() * 1e3
    check_independence(trainer, x, target)


@pytest.mark.parametrize("kind", ["flipped", "sorted"])
def test_rows_that_change_places_between_layers_are_refused_or_followed(kind):
    # One factor for each row would scale two examples' gradients together.
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if kind == "flipped":
                return self.second(h.flip(0)).flip(0)
            order = x[:, 0].argsort()
            return self.second(h[order])[order.argsort()]

    torch.manual_seed(0)
    x, target = torch.randn(6, 3).double(), torch.randn(6, 3).double()
    target[::2] *= 1e-3
    target[1::2] *= 1e3
    try:
        trainer = Trainer(Moved(), (3,), joint(), probe=True)
        trainer.released(x, target)
    except (CoverageError, PrivacyViolationError):
        return
    check_independence(trainer, x, target)
