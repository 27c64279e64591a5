"""The joint budget clips as flat clipping does, on every class of layers."""

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
from tests.joint.flat import batch_of
from tests.joint.helpers import (
    check_flat,
    clipped_flat,
    flat_of_opacus,
    own_gradients,
    released,
)
from tests.layers import Bags, Pair, Tokens
from tests.readers import FEATURES, STEPS, Reader
from tests.strategies import CASES, architectures, seed_torch, seeds, single_layers

LIMITS = st.sampled_from([1e-2, 1.0, 1e3])


def _check_opacus(draw, model, shape, dtype, tolerance, loss=linear_loss):
    model, limit = model.to(dtype), draw(LIMITS)
    reduction = draw(st.sampled_from(["mean", "sum"]))
    x, target = batch_of(model, shape, dtype)
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
    x, target = batch_of(model, shape, torch.float64)
    expected = clipped_flat(own_gradients(model, x, target), limit)
    trainer = Trainer(copy.deepcopy(model), shape, BackpropClipping(), max_grad_norm=limit)
    apart = (released(trainer, x, target) - expected).norm()
    assert apart <= 1e-9 * limit * len(x), f"differs by {apart}"


def _opacus_has_a_rule(module: nn.Module) -> bool:
    """Return whether Opacus's gradients of this module are right.

    Those of convolutions take every padding for zeros. Those of layer norms need a bias.
    """
    if isinstance(module, nn.LayerNorm) and module.bias is None:
        return False
    return getattr(module, "padding_mode", "zeros") == "zeros"


def _of_opacus():
    return architectures().filter(lambda case: all(map(_opacus_has_a_rule, case.layer.modules())))


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
        # No padding, which is zeros: a norm of zeros has a gradient that is mostly rounding.
        self.tokens = Tokens(nn.Embedding(7, 6))
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
    x, target = batch_of(model, (6,), torch.float64)
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
    x, target = batch_of(model, (3, 4), torch.float64)
    check_flat(lambda: copy.deepcopy(model), x, target)
