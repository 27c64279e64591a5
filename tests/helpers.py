"""Small models, private set-ups and snapshots that several test files share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import (
    BackpropClipOptimizer,
    BackpropClipping,
    PrivacyEngine,
    PrivacyViolationError,
)
from opacus_bpclip.sampling.records import Pass
from tests.budgets import layerwise
from tests.devices import device, generator_there, there

FEATURES, CLASSES = 4, 3
BOUNDS = pytest.mark.parametrize("bound", ["product", "weighted", "exact"])


def mlp(*, inplace: bool = False, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.ReLU(inplace=inplace), nn.Linear(8, CLASSES)
    ).to(dtype)


def one_layer() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, CLASSES))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x.unsqueeze(-2)).flatten(-2))


def dataset(size: int = 32, features: int = FEATURES) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(size, features, generator=generator) * 3
    return TensorDataset(x, torch.randint(0, CLASSES, (size,), generator=generator))


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    x, y = dataset().tensors
    return x[:size], y[:size]


# Opacus's own hints: about its search, which starts with far too much noise, and about the
# accountant that searches fastest.
SEARCHES_FOR_NOISE = pytest.mark.filterwarnings(
    "ignore:Optimal order is the largest alpha", "ignore:GDP accounting is experimental"
)


class Private(NamedTuple):
    """What training needs; ``model`` is what to call, ``handle`` what make_private returned."""

    engine: opacus.PrivacyEngine
    model: nn.Module
    optimizer: DPOptimizer
    loader: DataLoader
    handle: Any

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.optimizer.params

    @property
    def steps(self) -> int:
        """Steps in the accountant."""
        return sum(steps for _, _, steps in self.engine.accountant.history)


def make_private(
    model: nn.Module,
    *,
    engine: opacus.PrivacyEngine | None = None,
    backprop: BackpropClipping | None = None,
    data: TensorDataset | None = None,
    batch_size: int = 8,
    lr: float = 0.1,
    noise_multiplier: float = 0.0,
    max_grad_norm: float = 1.0,
    clipping: str = "backprop",
    wrap_model: bool = True,
    counted: bool = False,
    **options: Any,
) -> Private:
    """Make a model private; it takes any batch, unless the loader's are to be ``counted``."""
    engine = engine or PrivacyEngine()
    if all(p.device.type == "cpu" for p in model.parameters()):
        model.to(device())
    if "noise_generator" in options:
        options["noise_generator"] = generator_there(options["noise_generator"])
    if clipping == "backprop" or backprop is not None:
        options["backprop"] = backprop or layerwise()
    handle, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        data_loader=DataLoader(data or dataset(), batch_size=batch_size),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        wrap_model=wrap_model,
        **options,
    )
    if clipping == "backprop":
        optimizer.keep_summed_grad = True
        handle._guard.passes.samples.attached = counted
    return Private(engine, handle if wrap_model else model, optimizer, loader, handle)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def hand_over(private: Private, rows: int) -> None:
    """Pretend that the private loader has drawn a batch."""
    if isinstance(private.optimizer, BackpropClipOptimizer):
        private.optimizer._guard.passes.samples.draw(rows, Pass())


def backward(private: Private, size: int = 6) -> None:
    hand_over(private, size)
    loss_of(private.model, *(there(x) for x in batch(size))).backward()


def train_step(private: Private, size: int = 6) -> None:
    private.optimizer.zero_grad()
    backward(private, size)
    private.optimizer.step()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()


def values(private: Private) -> Tensor:
    return flat(private.parameters).clone()


def summed(private: Private) -> Tensor:
    return flat(p.summed_grad for p in private.parameters)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Everything that a refused call could leave behind, in a form that ``==`` compares."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {key: list(v) for key, v in vars(module).items() if isinstance(v, OrderedDict)}
        seen[f"module {name}"] = (type(module), module.training, sorted(vars(module)), hooks)
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.tolist()
        hooks = (
            list(parameter._backward_hooks or ()),
            list(parameter._post_accumulate_grad_hooks or ()),
        )
        flags = (id(parameter), parameter.requires_grad, parameter.dtype)
        value = None if nn.parameter.is_lazy(parameter) else repr(parameter.tolist())
        seen[f"parameter {name}"] = (flags, sorted(vars(parameter)), hooks, value, grad)
    if optimizer is not None:
        seen["optimizer"] = (type(optimizer), repr(optimizer.state_dict()))
    return seen


def assert_refused_until_zero_grad(private: Private) -> None:
    """A violation: ``step`` refuses, nothing moves, and ``zero_grad`` makes training go on."""
    before, steps = values(private), private.steps
    for _ in range(2):
        with pytest.raises(
            PrivacyViolationError, match="gradients are not covered by the guarantee: "
        ):
            private.optimizer.step()
    assert torch.equal(values(private), before)
    assert private.steps == steps
    private.optimizer.zero_grad()
    backward(private)
    private.optimizer.step()
    assert private.steps == steps + 1
    assert not torch.equal(values(private), before)
    assert summed(private).norm() <= 6 * private.optimizer.max_grad_norm
    private.optimizer.zero_grad()


Step = Callable[[Private], None]


class Switchable(nn.Module):
    """An ordinary model with a way to misbehave for one batch.

    ``trick`` takes the model and the batch, and stands in for ``forward`` while it is set.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(FEATURES, 8)
        self.head = nn.Linear(8, CLASSES)
        self.hidden = torch.zeros(0)
        self.trick: Callable[[Switchable, Tensor], Any] | None = None

    def forward(self, x: Tensor) -> Any:
        if self.trick is not None:
            return self.trick(self, x)
        self.hidden = self.body(x)
        return self.head(torch.relu(self.hidden))


def switchable(**options: Any) -> Private:
    return make_private(Switchable(), **options)


def model_of(private: Private) -> Switchable:
    return private.handle._module


def tricked(trick: Callable[[Switchable, Tensor], Any]) -> Step:
    """One batch through a forward pass that misbehaves."""

    def step(private: Private) -> None:
        model_of(private).trick = trick
        try:
            backward(private)
        finally:
            model_of(private).trick = None

    return step


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


def seeded(**options: Any) -> Private:
    options = {"noise_multiplier": 1.3, "max_grad_norm": 0.7} | options
    return make_private(
        options.pop("model", None) or mlp(),
        noise_generator=torch.Generator().manual_seed(5),
        **options,
    )


def noise(private: Private, divisor: float = 8) -> Tensor:
    """Return what the last step added to the sum."""
    return flat(p.grad * divisor - p.summed_grad for p in private.parameters)


def step_on(private: Private, x: Tensor, y: Tensor) -> None:
    private.optimizer.zero_grad()
    hand_over(private, len(x))
    loss_of(private.model, there(x), there(y)).backward()
    private.optimizer.step()
