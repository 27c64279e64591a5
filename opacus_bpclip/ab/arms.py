"""The arms: how each turns a model and a loader into something to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyEngine, clip_inputs
from opacus_bpclip.ab.averaging import WeightAverage
from opacus_bpclip.ab.settings import (
    ADAPTIVE,
    EXPANDED_WEIGHTS,
    FUNCTORCH,
    GHOST,
    NON_PRIVATE,
    PER_LAYER,
    Settings,
)
from opacus_bpclip.ab.task import Task
from opacus_bpclip.guard.precision import rounded_options, rounded_sums


@dataclass(frozen=True)
class Arm:
    """A model ready for training; ``engine`` is None without privacy.

    Attributes:
        device: of the model.
        precision: ``"bfloat16"`` for training under autocast.
        rows: largest number of examples that the model sees at once; None for any.
        criterion: of a step.
        schedule: of the learning rate; None without one.
        average: of the weights; None if the latest ones are judged.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]
    engine: PrivacyEngine | None
    device: torch.device
    precision: str
    rows: int | None
    criterion: nn.Module
    schedule: Any = None
    average: WeightAverage | None = None

    @contextmanager
    def batches(self) -> Iterator[DataLoader[Any]]:
        """Give the batches of an epoch; with privacy in parts that are small enough."""
        if self.engine is None or self.rows is None:
            yield self.loader
            return
        with BatchMemoryManager(
            data_loader=self.loader, max_physical_batch_size=self.rows, optimizer=self.optimizer
        ) as parts:
            yield parts

    @contextmanager
    def judged(self) -> Iterator[nn.Module]:
        """Give the model with the weights that count: the average, if there is one."""
        with self.average.in_place() if self.average else nullcontext():
            yield self.model

    @property
    def in_step(self) -> bool:
        """Whether more parts of the latest batch are to come before the optimizer's step."""
        return bool(getattr(self.optimizer, "_is_last_step_skipped", False))


def prepare(
    name: str,
    model: nn.Module,
    loader: DataLoader[Any],
    task: Task,
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
        task: shared by all arms.
        settings: shared by all arms.
        noise_multiplier: shared by all private arms; None only without privacy.
        noise_generator: on the model's device.
    """
    backprop, input_norm = settings.backprop(name), settings.input_norm(name)
    if backprop is None and input_norm is not None:
        clip_inputs(model, input_norm)
    optimizer = task.new_optimizer(model)
    criterion = task.criterion.to(noise_generator.device)
    engine = None
    if name == NON_PRIVATE:
        loader = DPDataLoader.from_data_loader(loader)
    else:
        assert noise_multiplier is not None
        engine = PrivacyEngine(accountant=settings.accountant)
        options: dict[str, Any] = {
            "max_grad_norm": settings.max_grad_norm,
            **_opacus_options(name, model, loader, settings),
        }
        if backprop is not None:
            options |= {"clipping": "backprop", "backprop": backprop}
        # A mean's division by the batch's size must not be rounded, and the terms of a user's own
        # loss are checked to be of one example each.
        exact = settings.precision == "float32" and settings.device == "cpu"
        exact = exact and not (backprop and rounded_options(backprop, model.parameters()))
        at_once = min(settings.batch_size, settings.physical_batch_size or settings.batch_size)
        exact = exact and not rounded_sums(at_once, settings.batch_size, model.parameters())
        if name == GHOST or (backprop is not None and (settings.loss or not exact)):
            options["criterion"] = criterion
        model, optimizer, *criteria, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=noise_multiplier,
            noise_generator=noise_generator,
            **options,
        )
        criterion = criteria[0] if criteria else criterion
    # Opacus's loader learns an empty batch's form from the first one that is not.
    loader.collate_fn([loader.dataset[0]])
    steps = settings.epochs * len(loader)
    schedule = task.schedule(optimizer, steps) if task.schedule else None
    decay = settings.weight_averaging
    return Arm(
        model=model,
        optimizer=optimizer,
        loader=loader,
        engine=engine,
        device=noise_generator.device,
        precision=settings.precision,
        rows=settings.physical_batch_size,
        criterion=criterion,
        schedule=schedule,
        average=WeightAverage(model, decay) if decay else None,
    )


def _opacus_options(
    name: str, model: nn.Module, loader: DataLoader[Any], settings: Settings
) -> dict[str, Any]:
    """Return what Opacus calls an arm of its own."""
    if name in (FUNCTORCH, EXPANDED_WEIGHTS, GHOST):
        return {"clipping": "flat", "grad_sample_mode": name}
    limit = settings.max_grad_norm
    if name == PER_LAYER:
        # Opacus clips each parameter; together they have the norm of the other arms.
        count = sum(p.requires_grad for p in model.parameters())
        return {"clipping": name, "max_grad_norm": [limit / count**0.5] * count}
    if name == ADAPTIVE:
        # The values of Andrew et al. (arXiv 1905.03871).
        return {
            "clipping": name,
            "target_unclipped_quantile": 0.5,
            "clipbound_learning_rate": 0.2,
            "max_clipbound": 100 * limit,
            "min_clipbound": limit / 100,
            "unclipped_num_std": settings.batch_size / 20,
        }
    return {"clipping": "flat"}
