"""A compiled graph sends its sums to separate leaves: a gradient at a parameter is unexpected."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchRuntimeError
from torch.nn import functional as F

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from tests.budgets import layerwise
from tests.checks import Trainer, joint

D = 4
BUDGETS = pytest.mark.parametrize(
    "clipping", [BackpropClipping(), layerwise(bound="exact", uses={"fc": 1})], ids=["joint", "own"]
)


class Later(nn.Module):
    """Does something else once it is told to, which a compiler traces anew."""

    way = "plain"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "rows":
            return self.fc(x.reshape(-1, D)).view(len(x), -1, 3).sum(1)
        y = self.fc(x.sum(1))
        return y + 100 * F.linear(x.sum(1), self.fc.weight) if self.way == "beside" else y


def _trained(clipping) -> tuple[Trainer, Tensor, Tensor]:
    trainer = Trainer(Later(), (2, D), clipping, reduction="sum", dtype=torch.float32)
    trainer.model = torch.compile(trainer.model, backend="aot_eager")
    x, target = torch.randn(5, 2, D), torch.randn(5, 3)
    trainer.step(x, target)
    return trainer, x, target


@BUDGETS
@pytest.mark.parametrize(
    ("way", "problem"),
    [
        ("beside", "got gradient from outside its layer's call"),
        ("rows", "in a batch of 5 examples"),
    ],
)
def test_what_a_graph_that_is_traced_later_does_otherwise_is_refused(clipping, way, problem):
    trainer, x, target = _trained(clipping)
    trainer.plain.way = way
    # While a graph is traced, torch raises an error of its own around the reason.
    with pytest.raises((PrivacyViolationError, TorchRuntimeError), match=problem):
        trainer.step(x, target)


@BUDGETS
def test_a_penalty_or_a_function_beside_the_model(clipping):
    trainer, x, _ = _trained(clipping)
    weight = trainer.plain.fc.weight
    for extra in (weight.square().sum(), F.linear(x.sum(1), weight).sum()):
        trainer.optimizer.zero_grad()
        with pytest.raises(PrivacyViolationError, match="Functions on parameters cannot be"):
            (trainer.model(x).sum() + extra).backward()


@BUDGETS
def test_parameters_in_bfloat16_get_sums_in_float32(clipping):
    sums = []
    for compiled in (False, True):
        low = torch.bfloat16
        trainer = Trainer(Later(), (2, D), clipping, reduction="sum", dtype=low)
        if compiled:
            trainer.model = torch.compile(trainer.model, backend="aot_eager")
        torch.manual_seed(2)
        x, target = torch.randn(64, 2, D).to(low), torch.randn(64, 3).to(low)
        sums.append(joint(trainer.released(x, target)))
    assert sums[1].dtype == torch.float32
    torch.testing.assert_close(*sums, rtol=0, atol=1e-5)


@BUDGETS
@pytest.mark.parametrize(
    ("to", "reason"),
    [
        (
            {"dtype": torch.float64},
            r"fc\.(weight|bias) was moved to cpu and torch\.float64 after make_private, and a "
            r"compiled graph would send its gradient to cpu in torch\.float32\. Move the model "
            r"first, then call make_private; or train without torch\.compile\.",
        ),
        # There torch makes other parameters.
        ({"device": "meta"}, r"fc\.weight is not the parameter that make_private saw"),
    ],
)
def test_a_model_that_was_moved_after_make_private_is_refused(clipping, to, reason):
    trainer = Trainer(Later(), (2, D), clipping, reduction="sum", dtype=torch.float32)
    trainer.plain.to(**to)
    call = torch.compile(trainer.model, backend="aot_eager")
    x = torch.randn(5, 2, D).to(**to)
    with pytest.raises((PrivacyViolationError, TorchRuntimeError), match=reason):
        call(x).sum().backward()
    with pytest.raises(PrivacyViolationError, match="not covered"):
        trainer.optimizer.step()


def test_another_device_is_noticed_as_another_dtype_is():
    trainer, *_ = _trained(BackpropClipping())
    watched = trainer.model._orig_mod._guard.parameters[trainer.plain.fc.weight]
    assert watched.moved() is None
    watched.sink = watched.sink.to("meta")
    assert "would send its gradient to meta" in watched.moved()
