"""The search for state leaves the model as it was, whatever its buffers and gradients are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_bpclip.probe import copies
from opacus_bpclip.probe.copies import Copy
from tests.helpers import CLASSES, FEATURES, make_private, train_step
from tests.probing import found
from tests.stateful import Counter


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "attribute"])
def test_nested_tensors_do_not_stop_the_search(layout: Any, buffer: bool) -> None:
    model = nn.Linear(FEATURES, CLASSES)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    if buffer:
        model.register_buffer("kept", nested, persistent=False)
    else:
        model.kept = nested
    weight = model.weight
    assert found(model) is None
    assert model.weight is weight
    assert model.kept is nested


def test_an_error_while_a_model_is_copied_leaves_it_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no copy")

    model = nn.Linear(FEATURES, CLASSES)
    weight = model.weight
    monkeypatch.setattr(copies, "buffers_of", failing)
    with pytest.raises(RuntimeError, match="no copy"), Copy(model, double=True):
        pass
    assert model.weight is weight


class Checkpointed(Counter):
    """Runs a frozen part inside a reentrant checkpoint, and counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(CLASSES, CLASSES).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.frozen, super().forward(x), use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints_do_not_stop_the_search() -> None:
    private = make_private(Checkpointed())
    train_step(private)
    assert private.steps == 1


def test_the_search_leaves_gradients_as_they_were() -> None:
    outside = torch.ones(FEATURES, requires_grad=True)
    outside.grad = before = torch.full((FEATURES,), 3.0)
    model = Counter()
    model.register_forward_pre_hook(lambda _, args: args[0] * outside)
    assert found(model) is None
    assert outside.grad is before
    assert before.eq(3).all()
    assert model.layer.weight.grad is None


def test_an_output_whose_gradient_fails_does_not_stop_the_search() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise NotImplementedError

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, Failing.apply(y)

    assert found(Model(FEATURES, CLASSES)) is None
