"""The optimizer and the learning-rate schedule, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.jobs.errors import UsageError

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer, int], Any]
# What torch's schedules call the number of steps.
_LENGTHS = ("T_max", "total_steps", "total_iters")


def optimizer_of(settings: Settings, own: Any) -> MakeOptimizer:
    """Return what makes the optimizer of parameters.

    Args:
        settings: its name, learning rate and momentum.
        own: the user's own factory; None for a class of torch.optim.

    Raises:
        UsageError: there is no such class, or it takes no momentum.
    """
    name = settings.optimizer
    make = own or getattr(torch.optim, name, None)
    if own is None and not (isinstance(make, type) and issubclass(make, Optimizer)):
        raise UsageError(
            f"--optimizer {name}: torch.optim has no such class; give one, as AdamW, or a "
            "MODULE:FACTORY that is called with the parameters and lr"
        )
    assert callable(make)
    options = {"lr": settings.lr}
    if settings.momentum is not None:
        options["momentum"] = settings.momentum
        if "momentum" not in inspect.signature(make).parameters:
            raise UsageError(f"--optimizer {name} takes no --momentum")
    return lambda parameters: make(parameters, **options)


def schedule_of(settings: Settings, own: MakeSchedule | None) -> MakeSchedule | None:
    """Return what makes the schedule of an optimizer and a number of steps; None without one.

    Args:
        settings: its name.
        own: the user's own factory; None for a class of torch.optim.lr_scheduler.

    Raises:
        UsageError: there is no such class, or the number of steps does not settle its length.
    """
    name = settings.schedule
    if own or name is None:
        return own
    make = getattr(torch.optim.lr_scheduler, name, None)
    lengths = [each for each in _LENGTHS if make and each in inspect.signature(make).parameters]
    if make is None or not lengths:
        what = "has a length that is a number of steps" if make else "is such a class"
        raise UsageError(
            f"--schedule {name}: no class of torch.optim.lr_scheduler of this name {what}; give "
            "one, as CosineAnnealingLR, or a MODULE:FACTORY that is called with the optimizer and "
            "the number of steps"
        )
    options = {"max_lr": settings.lr} if "max_lr" in inspect.signature(make).parameters else {}
    return lambda optimizer, steps: make(optimizer, **{lengths[0]: steps}, **options)
