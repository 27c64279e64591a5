"""The joint budget with exact norms is flat DP-SGD: Opacus's own sums, and plain autograd's."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers.pytorch_utils import Conv1D

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer, linear_loss, squared_loss
from tests.joint.helpers import (
    ATTAINED,
    check_flat,
    clipped_flat,
    flat_of_opacus,
    joint,
    own_gradients,
    released,
)
from tests.layers import Bags, Pair, Tokens, ids_of
from tests.readers import FEATURES, STEPS, Reader
from tests.strategies import CASES, MODES, architectures, seed_torch, seeds, single_layers
from tests.worst_cases import WORST_CASES

LIMITS = st.sampled_from([1e-2, 1.0, 1e3])


def _batch(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, *shape, dtype=dtype)
    with torch.no_grad():
        outputs = model(x).flatten(1).shape[1]
    # Examples of several sizes: some are clipped, some are not.
    rows = torch.tensor([1e-2, 1.0, 30.0, 0.3], dtype=dtype)
    return x, torch.randn(4, outputs, dtype=dtype) * rows[:, None]


def _check_opacus(draw, model, shape, dtype, tolerance, loss=linear_loss):
    model, limit = model.to(dtype), draw(LIMITS)
    reduction = draw(st.sampled_from(["mean", "sum"]))
    x, target = _batch(model, shape, dtype)
    expected = flat_of_opacus(model, x, target, limit, loss, reduction)
    trainer = Trainer(
        model,
        shape,
        BackpropClipping(),
        max_grad_norm=limit,
        dtype=dtype,
        reduction=reduction,
        loss=loss,
    )
    apart = (released(trainer, x, target) - expected).norm()
    assert apart <= tolerance * limit * len(x), f"differs by {apart}"


def _check_autograd(draw, model, shape):
    model, limit = model.double(), draw(LIMITS)
    x, target = _batch(model, shape, torch.float64)
    expected = clipped_flat(own_gradients(model, x, target), limit)
    trainer = Trainer(copy.deepcopy(model), shape, BackpropClipping(), max_grad_norm=limit)
    apart = (released(trainer, x, target) - expected).norm()
    assert apart <= 1e-9 * limit * len(x), f"differs by {apart}"


def _of_opacus():
    # Opacus's gradients of convolutions take every padding for zeros.
    return architectures().filter(
        lambda case: all(
            getattr(module, "padding_mode", "zeros") == "zeros" for module in case.layer.modules()
        )
    )


@settings(max_examples=60)
@given(st.data())
def test_the_sum_is_opacus_own(data):
    case = data.draw(_of_opacus())
    loss = data.draw(st.sampled_from([linear_loss, squared_loss]))
    _check_opacus(data.draw, case.layer, case.shape, torch.float64, 1e-9, loss)


@settings(max_examples=40)
@given(st.data())
def test_the_sum_is_opacus_own_in_float32(data):
    case = data.draw(_of_opacus())
    _check_opacus(data.draw, case.layer, case.shape, torch.float32, 3e-5)


@settings(max_examples=80)
@given(st.data())
def test_the_sum_is_autograds_clipped_by_example(data):
    case = data.draw(architectures())
    _check_autograd(data.draw, case.layer, case.shape)


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
@settings(max_examples=8)
@given(data=st.data())
def test_every_class_of_layers_is_clipped_flat(kind, data):
    # By plain autograd: Opacus has no rule for some, and wrong ones for convolutions that pad by
    # reflection and for offsets of bags.
    case = data.draw(single_layers(kind))
    _check_autograd(data.draw, case.layer, case.shape)


class Everything(nn.Module):
    """A layer of each path in one model, deep, so that each meets the gradients of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens(nn.Embedding(7, 6, padding_idx=2))
        self.bags = Bags(nn.EmbeddingBag(5, 4, mode="mean"))
        self.positional = Conv1D(6, 6)
        self.norm, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2, padding_mode="circular")
        self.other = nn.Conv1d(4, 4, 2, stride=2)
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)
        self.act = nn.PReLU(4)
        self.up = nn.ConvTranspose1d(4, 3, 2, stride=2)
        self.pair = Pair(nn.Bilinear(3, 4, 2))
        self.rnn = DPLSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.tokens(x))
        y = self.rms(y + torch.tanh(self.positional(y))).transpose(1, 2)
        y = self.act(self.instance(self.group(self.other(self.conv(y)))))
        y = self.up(y)[:, :, : x.shape[1]].transpose(1, 2)
        bag = self.bags(torch.stack([x, x], dim=1))
        y = self.pair(torch.cat([y, bag.unsqueeze(1).expand(-1, y.shape[1], -1)], dim=2))
        return self.head(self.rnn(y)[0])


@settings(max_examples=8)
@given(seeds)
def test_all_layers_in_one_model_share_one_factor(seed):
    torch.manual_seed(seed)
    model = Everything().double()
    x, target = _batch(model, (6,), torch.float64)
    check_flat(lambda: copy.deepcopy(model), 3 * x, target)


@pytest.mark.parametrize("kind", [DPRNN, DPLSTM, DPGRU], ids=lambda kind: kind.__name__)
@settings(max_examples=10)
@given(data=st.data())
def test_recurrent_networks_are_clipped_as_opacus_clips_them(kind, data):
    seed_torch(data.draw)
    options = {
        "num_layers": data.draw(st.integers(1, 2)),
        "bidirectional": data.draw(st.booleans()),
        "bias": data.draw(st.booleans()),
        "batch_first": data.draw(st.booleans()),
    }
    model = Reader(kind, **options)
    _check_opacus(data.draw, model, (STEPS, FEATURES), torch.float64, 1e-9)


class Packed(nn.Module):
    """Layers before and after a network that has its rows in the order of their lengths."""

    def __init__(self, *, enforce_sorted: bool) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(FEATURES, FEATURES), nn.Linear(4, 2)
        self.rnn = DPGRU(FEATURES, 4, batch_first=True, bidirectional=False, num_layers=2)
        self.enforce_sorted = enforce_sorted

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0].detach() != 0).sum(dim=1).clamp(min=1)
        packed = pack_padded_sequence(
            self.before(x), lengths, batch_first=True, enforce_sorted=self.enforce_sorted
        )
        return self.after(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(dim=1))


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequences_are_clipped_by_example(enforce_sorted):
    torch.manual_seed(0)
    x = torch.randn(5, STEPS, FEATURES).double()
    for i, length in enumerate([5, 4, 4, 2, 1] if enforce_sorted else [2, 5, 1, 4, 4]):
        x[i, length:] = 0
    target = torch.randn(5, 2).double() * torch.tensor([1e-2, 10, 1, 0.1, 5]).double()[:, None]
    model = Packed(enforce_sorted=enforce_sorted)
    check_flat(lambda: copy.deepcopy(model), x, target)


class Attending(nn.Module):
    def __init__(self, *, bias_kv: bool, batch_first: bool) -> None:
        super().__init__()
        self.attention = DPMultiheadAttention(4, 2, add_bias_kv=bias_kv, batch_first=batch_first)
        self.batch_first = batch_first
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = x if self.batch_first else x.transpose(0, 1)
        y = self.attention(z, z, z, need_weights=False)[0]
        return self.head(self.norm(x + (y if self.batch_first else y.transpose(0, 1))))


@pytest.mark.parametrize("bias_kv", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_clipped_by_example(bias_kv, batch_first):
    torch.manual_seed(0)
    model = Attending(bias_kv=bias_kv, batch_first=batch_first).double()
    x, target = _batch(model, (3, 4), torch.float64)
    check_flat(lambda: copy.deepcopy(model), x, target)


# Layers used twice, and tied ones. By plain autograd: Opacus's hooks add the uses of one module up,
# but keep no account of a parameter that two modules share.


class Repeated(nn.Module):
    """Two uses of a layer of each kind, with other shapes of the input where that can be."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(4, 4)
        self.layer = {
            "linear": lambda: nn.Linear(4, 4),
            "transposed linear": lambda: Conv1D(4, 4),
            "conv": lambda: nn.Conv1d(1, 1, 3, padding=1),
            "grouped conv": lambda: nn.Conv1d(4, 4, 1, groups=2),
            "reflected conv": lambda: nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"),
            "conv transpose": lambda: nn.ConvTranspose1d(1, 1, 3, padding=1),
            "layer norm": lambda: nn.LayerNorm(4),
            "group norm": lambda: nn.GroupNorm(2, 4),
            "prelu": lambda: nn.PReLU(),
            "bilinear": lambda: nn.Bilinear(4, 4, 4),
        }[kind]()

    def use(self, x: Tensor) -> Tensor:
        if self.kind == "bilinear":
            return self.layer(x, x + 1)
        if self.kind == "grouped conv":
            return self.layer(x.unsqueeze(2)).squeeze(2)
        if "conv" in self.kind:
            return self.layer(x.unsqueeze(1)).squeeze(1)
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.use(torch.tanh(self.first(x)))
        return torch.cat([self.use(torch.tanh(y)), self.use(x)], dim=1)


KINDS = (
    "linear",
    "transposed linear",
    "conv",
    "grouped conv",
    "reflected conv",
    "conv transpose",
    "layer norm",
    "group norm",
    "prelu",
    "bilinear",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_used_three_times_is_measured_together(kind):
    torch.manual_seed(0)
    model = Repeated(kind).double()
    x, target = _batch(model, (4,), torch.float64)
    check_flat(lambda: copy.deepcopy(model), x, target)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_of_a_layer_used_three_times_is_a_sum_of_nothing(kind):
    model = Repeated(kind)
    trainer = Trainer(model, (4,), BackpropClipping())
    empty = torch.zeros(0, 4, dtype=torch.float64)
    assert not released(trainer, empty, torch.zeros(0, 8, dtype=torch.float64)).any()


class Language(nn.Module):
    """An embedding whose weight is the output head's, which has a bias of its own."""

    def __init__(self, *, padding: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 3, padding_idx=padding)
        self.middle, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.head = nn.Linear(3, 6)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.middle(self.tokens(ids_of(x, 6))))))


class Bound(nn.Module):
    """Layers of two kinds that share parameters in ways of their own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        make = {
            "linear": lambda: nn.Linear(4, 4),
            "linear, both": lambda: nn.Linear(4, 4),
            "conv": lambda: nn.Conv1d(1, 1, 3, padding=1),
            "norms": lambda: nn.LayerNorm(4),
            "slopes": lambda: nn.PReLU(),
            "bias alone": lambda: nn.Linear(4, 4),
            "linear and bag": lambda: nn.Linear(4, 4),
        }[kind]
        self.one, self.other = make(), make()
        if kind == "linear and bag":
            self.other = nn.EmbeddingBag(4, 4, mode="sum")
        if kind == "bias alone":
            self.other.bias = self.one.bias
        else:
            self.other.weight = self.one.weight
        if kind == "linear, both":
            self.other.bias = self.one.bias
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            x = x.unsqueeze(1)
            return self.head(self.other(torch.tanh(self.one(x)))[:, 0])
        y = torch.tanh(self.one(x))
        return self.head(y + self.other(ids_of(x, 4) if self.kind == "linear and bag" else y))


BOUND = ("linear", "linear, both", "conv", "norms", "slopes", "bias alone", "linear and bag")


@pytest.mark.parametrize("kind", BOUND)
def test_tied_parameters_are_measured_together(kind):
    torch.manual_seed(0)
    model = Bound(kind).double()
    x, target = _batch(model, (4,), torch.float64)
    check_flat(lambda: copy.deepcopy(model), x, target)


@pytest.mark.parametrize("kind", BOUND)
def test_an_empty_batch_of_tied_parameters_is_a_sum_of_nothing(kind):
    trainer = Trainer(Bound(kind), (4,), BackpropClipping())
    empty = torch.zeros(0, 4, dtype=torch.float64)
    assert not released(trainer, empty, torch.zeros(0, 2, dtype=torch.float64)).any()


@pytest.mark.parametrize("padding", [None, 1])
def test_an_embedding_tied_to_the_head_is_measured_with_it(padding):
    torch.manual_seed(0)
    model = Language(padding=padding).double()
    x, target = _batch(model, (5,), torch.float64)
    check_flat(lambda: copy.deepcopy(model), 9 * x, target)


# Attainment


@pytest.mark.parametrize(("bound", "normalize"), MODES)
@pytest.mark.parametrize("kind", WORST_CASES, ids=lambda kind: kind.__name__)
def test_one_example_reaches_delta(kind, bound, normalize):
    torch.manual_seed(0)
    worst = WORST_CASES[kind]
    model, x = worst.make().double(), worst.example
    with torch.no_grad():
        response = (model(x) - model(torch.zeros_like(x))).flatten(1)
    target = torch.zeros_like(response)
    target[0, response.abs().argmax() if worst.output is None else worst.output] = 1e6
    trainer = Trainer(
        model, worst.shape, joint(bound=bound, normalize=normalize), max_grad_norm=2.0
    )
    assert ATTAINED * 2.0 <= released(trainer, x, target).norm() <= 2.0


@settings(max_examples=100)
@given(st.data())
def test_no_factor_of_the_exact_bound_is_smaller_than_it_must_be(data):
    case = data.draw(architectures())
    model, limit = case.layer.double(), data.draw(st.sampled_from([1e-3, 1.0, 1e3]))
    x, target = _batch(model, case.shape, torch.float64)
    own = own_gradients(model, x, target)
    trainer = Trainer(copy.deepcopy(model), case.shape, BackpropClipping(), max_grad_norm=limit)
    for i, gradient in enumerate(own):
        contribution = released(trainer, x[i : i + 1], target[i : i + 1])
        needed = min(float(gradient.norm()), limit)
        assert contribution.norm() >= needed * (1 - 1e-6) - 1e-12 * limit
        assert contribution.norm() <= limit


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_uses_that_add_up_reach_delta_together(kind, normalize):
    torch.manual_seed(0)
    model = Repeated(kind).double()
    trainer = Trainer(model, (4,), joint(normalize=normalize), max_grad_norm=0.9)
    x, target = _batch(model, (4,), torch.float64)
    reached = released(trainer, x[:1], 1e6 * target[:1]).norm()
    assert ATTAINED * 0.9 <= reached <= 0.9
