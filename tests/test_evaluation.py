"""The guarantee does not concern evaluation: a private model evaluates in any dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import PrivacyViolationError
from tests.budgets import layerwise
from tests.helpers import BOUNDS, make_private
from tests.test_compile import fresh_compiler  # noqa: F401


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = DPLSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = DPMultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "grouped convolution": (lambda: nn.Conv1d(4, 4, 3, groups=2, bias=False), (4, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 3), (3, 6, 6)),
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "frozen layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4).requires_grad_(False)),
        (4,),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 5)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "RMS norm": (lambda: nn.RMSNorm(4), (4,)),
    "PReLU": (lambda: nn.PReLU(), (4,)),
    "LSTM": (Reading, (5, 4)),
    "attention": (Attending, (5, 4)),
    "several": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), (4,)),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])


def private_model(name: str, bound: str, *, wrap_model: bool) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, *shape))
    # With input clipping, which is a part of the model in evaluation, too.
    clipping = layerwise(bound=bound, max_input_norm=0.5)
    private = make_private(make(), data=data, backprop=clipping, wrap_model=wrap_model)
    return private.model, data.tensors[0]


@BOUNDS
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wrap_model", [True, False])
def test_a_private_model_evaluates_under_autocast(name: str, bound: str, wrap_model: bool) -> None:
    model, x = private_model(name, bound, wrap_model=wrap_model)
    contexts: list[Callable[[], AbstractContextManager[None]]]
    contexts = [torch.no_grad, torch.inference_mode]
    for training in (True, False):
        model.train(training)
        for context in contexts:
            with context():
                exact = model(x)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    rounded = model(x)
            torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


@DTYPES
@BOUNDS
@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_of_a_private_model_evaluates_in_another_dtype(
    name: str, bound: str, dtype: torch.dtype
) -> None:
    model, x = private_model(name, bound, wrap_model=True)
    other = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        found = other(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), model(x), rtol=0.05, atol=0.05)


def test_statistics_are_not_taken_up_in_a_pass_without_gradients() -> None:
    norm = nn.BatchNorm1d(4, affine=False)
    model = nn.Sequential(nn.Linear(4, 4), norm.eval(), nn.Linear(4, 2))
    private = make_private(model)
    x, before = torch.randn(6, 4), norm.running_var.clone()
    private.model.train()
    with torch.no_grad():
        with pytest.raises(PrivacyViolationError, match=r"^1 is in training mode, so that a pass"):
            private.model(x)
        norm.eval()
        private.model(x)
        private.model.eval()
        private.model(x)
    assert torch.equal(norm.running_var, before)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4, affine=False),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.SyncBatchNorm(4, affine=False),
        nn.BatchNorm1d(4, affine=False, momentum=None),
    ],
    ids=["batch", "instance", "synchronised", "cumulative"],
)
def test_a_part_of_a_model_takes_up_no_statistics_either(norm: nn.Module) -> None:
    features = nn.Sequential(norm.eval(), nn.Tanh())
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(12, 2))
    private = make_private(model, data=TensorDataset(torch.randn(8, 4, 3), torch.zeros(8)))
    x, before = torch.randn(6, 4, 3), norm.running_mean.clone()
    norm.train()
    parts = [private.model, features, norm]
    parts += [torch.compile(part, backend="eager") for part in parts]
    refusal = pytest.raises(Exception, match=r"0\.0 is in training mode, so that a pass")
    for part in parts:
        for without in (torch.no_grad(), torch.inference_mode()):
            with without, refusal:
                part(x)
    assert torch.equal(norm.running_mean, before)
    with torch.no_grad(), refusal:
        copy.deepcopy(features)(x)
    private.model.remove_hooks()
    with torch.no_grad():
        features(x)


def test_statistics_that_do_not_move_are_no_reason_to_refuse() -> None:
    norm = nn.BatchNorm1d(4, affine=False, momentum=0.0)
    private = make_private(nn.Sequential(nn.Linear(4, 4), norm.eval(), nn.Linear(4, 2)))
    norm.train()
    with torch.no_grad():
        private.model(torch.randn(6, 4))
