"""The arms: one training step of a case, by each way of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, PrivacyEngine
from opacus_bpclip.bench.cases import batch, build
from opacus_bpclip.bench.settings import BACKPROP, NON_PRIVATE, Case, is_compiled, method_of

Step = Callable[[], None]

_MAX_INPUT_NORM = 3.0


def make_step(arm: str, case: Case, device: torch.device, precision: str = "float32") -> Step:
    """Return a whole training step: forward, loss, backward, clipping, noise, optimizer, zero_grad.

    Everything but the clipping is the same for all arms: weights, batch, loss, optimizer, noise.
    What an arm holds for one step alone is gone after it. A compiled arm is compiled by its first
    steps.

    Args:
        arm: a name in `settings.ARMS`.
        case: the model and its batch.
        device: where to train.
        precision: of the forward pass. In ``"bfloat16"`` all arms train by autocast on the sum of
            the losses: a mean's division would be rounded by the batch's size.

    Raises:
        Exception: whatever an arm raises that cannot train the model.
    """
    torch.manual_seed(0)
    model: nn.Module = build(case).to(device)
    x, y = (tensor.to(device) for tensor in batch(case))
    low = precision == "bfloat16"
    # On a GPU products of float32 numbers may be rounded, too.
    reduction = "sum" if low or device.type == "cuda" else "mean"
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss(reduction=reduction)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if method_of(arm) != NON_PRIVATE:
        model, optimizer, *criteria, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            # Only its size counts, which sets the divisor: the steps take the batch as it is.
            data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            loss_reduction=reduction,
            poisson_sampling=False,
            # Of these, only ghost clipping needs it. The others take the loss as it is.
            criterion=criterion if method_of(arm) == "ghost" else None,
            **_options(method_of(arm)),
        )
        criterion = criteria[0] if criteria else criterion
    forward: Callable[[Tensor], Tensor] = model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss = criterion(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if is_compiled(arm):
        forward = torch.compile(model)
    return step


def clipping_of(method: str) -> BackpropClipping:
    """Return the options of an arm in `settings.BACKPROP`.

    With a joint budget inputs are clipped only where the bound needs it, as by default. Layers with
    budgets of their own clip them always, as the published method does.
    """
    budget, bound = method.split("-")
    joint = budget == "joint"
    return BackpropClipping(
        allocation="joint" if joint else "dimension",
        bound=bound,  # type: ignore[arg-type]
        max_input_norm=None if joint and bound != "product" else _MAX_INPUT_NORM,
    )


def _options(method: str) -> dict[str, Any]:
    if method in BACKPROP:
        return {"clipping": "backprop", "backprop": clipping_of(method)}
    return {"clipping": "flat", "grad_sample_mode": method}
