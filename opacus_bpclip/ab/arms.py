"""The arms: how each turns a model and a loader into something to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyEngine, clip_inputs
from opacus_bpclip.ab.settings import NON_PRIVATE, Settings


@dataclass(frozen=True)
class Arm:
    """A model ready for training; ``engine`` is None without privacy.

    Attributes:
        precision: ``"bfloat16"`` for training under autocast.
        criterion: of a step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]
    engine: PrivacyEngine | None
    precision: str
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)


def prepare(
    name: str,
    model: nn.Module,
    loader: DataLoader[Any],
    settings: Settings,
    noise_multiplier: float | None,
    noise_generator: torch.Generator,
) -> Arm:
    """Return an arm over a freshly initialised model.

    Args:
        name: one of the settings' arms.
        model: changed in place.
        loader: an ordinary loader with a generator of its own; the arm draws Poisson batches from
            the same generator.
        settings: shared by all arms.
        noise_multiplier: shared by all private arms; None only without privacy.
        noise_generator: on the model's device.
    """
    backprop, input_norm = settings.backprop(name), settings.input_norm(name)
    if backprop is None and input_norm is not None:
        clip_inputs(model, input_norm)
    sgd = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
    if name == NON_PRIVATE:
        return Arm(model, sgd, DPDataLoader.from_data_loader(loader), None, settings.precision)
    options: dict[str, Any] = {"clipping": "flat"}
    if backprop is not None:
        options = {"clipping": "backprop", "backprop": backprop}
        # A mean's division by the batch's size must not be rounded.
        if settings.precision != "float32":
            options["criterion"] = nn.CrossEntropyLoss()
    assert noise_multiplier is not None
    engine = PrivacyEngine(accountant=settings.accountant)
    private_model, optimizer, *criterion, private_loader = engine.make_private(
        module=model,
        optimizer=sgd,
        data_loader=loader,
        noise_multiplier=noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        noise_generator=noise_generator,
        **options,
    )
    return Arm(private_model, optimizer, private_loader, engine, settings.precision, *criterion)
