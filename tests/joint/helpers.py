"""Models, strategies and comparisons of the tests of the joint budget."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import opacus
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping
from tests.checks import Loss, Trainer, linear_loss
from tests.strategies import BOUNDS

ATTAINED = 0.999


@st.composite
def joint_clippings(draw: st.DrawFn) -> BackpropClipping:
    """Ways to clip with one factor for each example."""
    bound = draw(st.sampled_from(BOUNDS))
    norms = st.sampled_from([0.1, 1.0, 3.0, 100.0])
    return BackpropClipping(
        bound=bound,
        max_input_norm=draw(norms if bound == "product" else st.one_of(st.none(), norms)),
        normalize=draw(st.booleans()),
    )


def joint(**options: object) -> BackpropClipping:
    """Options with a joint budget; the product bound has its input norm."""
    if options.get("bound") == "product":
        options = {"max_input_norm": 3.0} | options
    return BackpropClipping(**options)  # type: ignore[arg-type]


def outputs_of(model: nn.Module, shape: tuple[int, ...]) -> int:
    like = next(model.parameters())
    with torch.no_grad():
        return model(like.new_zeros(1, *shape)).numel()


def summed(model: nn.Module) -> Tensor:
    """Return the clipped sum of all trainable parameters, in the model's order."""
    return torch.cat(
        [p.summed_grad.detach().flatten() for p in model.parameters() if p.requires_grad]
    ).cpu()


def released(trainer: Trainer, x: Tensor, target: Tensor) -> Tensor:
    trainer.step(x, target)
    return summed(trainer.plain)


def own_gradients(
    model: nn.Module, x: Tensor, target: Tensor, loss: Loss = linear_loss
) -> list[Tensor]:
    """Return each example's gradient by plain autograd, one example at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    own = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), target[i : i + 1], "sum")
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        own.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(parameters, gradients, strict=True)
                ]
            )
        )
    return own


def clipped_flat(own: list[Tensor], limit: float) -> Tensor:
    """Return the sum of gradients, each clipped as flat clipping does."""
    return sum(
        (g * min(1.0, limit / (float(g.norm()) + 1e-300)) for g in own), torch.zeros_like(own[0])
    )


def flat_of_opacus(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    limit: float,
    loss: Loss = linear_loss,
    reduction: str = "mean",
) -> Tensor:
    """Return the sum of Opacus's own gradients, on a copy of the model, each clipped to the limit.

    Opacus adds 1e-6 to the norm that it divides by, so that its sum is a little smaller.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        # Opacus's hooks on a module's output do not go with a change of it in place.
        if getattr(module, "inplace", False):
            module.inplace = False
    trainable = [p for p in model.parameters() if p.requires_grad]
    data = TensorDataset(torch.zeros(16, *x.shape[1:], dtype=x.dtype))
    private, optimizer, _ = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trainable, lr=0.0),
        data_loader=DataLoader(data, batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=limit,
        loss_reduction=reduction,
        clipping="flat",
        grad_sample_mode="hooks",
    )
    with warnings.catch_warnings():
        # Torch's, on Opacus's hooks on a first layer.
        warnings.simplefilter("ignore")
        loss(private(x), target, reduction).backward()
    own = torch.cat([g.detach().flatten(1) for g in optimizer.grad_samples], dim=1)
    optimizer.step()
    released = torch.cat([p.summed_grad.detach().flatten() for p in trainable])
    exact = clipped_flat(list(own), limit)
    rounding = 1e-4 if x.dtype == torch.float32 else 1e-9
    assert (released - exact).norm() <= len(x) * (1e-6 + rounding * limit)
    return exact


def check_flat(
    make: Callable[[], nn.Module],
    x: Tensor,
    target: Tensor,
    limits: tuple[float, ...] = (1e-2, 1.0, 1e3),
    tolerance: float = 1e-9,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> None:
    """The joint, exact sum is each example's own gradient, clipped as flat clipping does."""
    for limit in limits:
        model = make().to(dtype)
        expected = clipped_flat(own_gradients(copy.deepcopy(model), x, target), limit)
        trainer = Trainer(
            model, tuple(x.shape[1:]), BackpropClipping(), max_grad_norm=limit, dtype=dtype
        )
        apart = (released(trainer, x, target) - expected).norm()
        assert apart <= tolerance * limit * len(x), f"differs from flat clipping by {apart}"
