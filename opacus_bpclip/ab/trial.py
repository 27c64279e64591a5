"""What is tried before anything trains: the user's own parts, then each arm, on a few examples."""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor

from opacus_bpclip.ab.batches import Batch
from opacus_bpclip.ab.results import Plan
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.task import Task
from opacus_bpclip.ab.training import evaluate, start, step
from opacus_bpclip.errors import CoverageError
from opacus_bpclip.jobs.errors import UsageError, in_one_line, told_of_users_code
from opacus_bpclip.jobs.quiet import known_warnings_silenced

_EXAMPLES = 8
# In a draw of a batch of 8, or in a few.
_ENOUGH = 4


@known_warnings_silenced()
def check(task: Task, settings: Settings) -> None:
    """Take a step without privacy, and evaluate the model once on the whole test set.

    Raises:
        UsageError: something raises; the text names it.
    """
    device = torch.device(settings.device)
    model_path, data_path = settings.factories
    with told_of_users_code(model_path):
        model = task.model().to(device)
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(f"{model_path} has no trainable parameter")
    with told_of_users_code(data_path):
        batch = Batch.of(next(iter(task.loader(_EXAMPLES))), device)
    with told_of_users_code(f"{model_path} on a batch of {data_path}"):
        outputs = batch.outputs_of(model)
    if not settings.loss:
        _require_classes(data_path, outputs, batch.targets)
    with told_of_users_code(f"the loss {settings.loss or 'cross-entropy'} on a batch"):
        task.criterion.to(device)(outputs, batch.targets).backward()
    with told_of_users_code(f"--optimizer {settings.optimizer}"):
        optimizer = task.new_optimizer(model)
        optimizer.step()
    if task.schedule:
        with told_of_users_code(f"--schedule {settings.schedule}"):
            steps = settings.epochs * len(task.loader(settings.batch_size))
            schedule = task.schedule(optimizer, steps)
            optimizer.step()
            schedule.step()
    with told_of_users_code(f"the metric {task.measure.name} on the test set"):
        evaluate(model, task, settings)


@known_warnings_silenced()
def problem_of(name: str, settings: Settings, plan: Plan, task: Task) -> str:
    """Return in one line why an arm cannot train the model; empty if it takes a step."""
    if settings.physical_batch_size:
        # So few that there are several parts.
        settings = settings.replace(physical_batch_size=min(settings.physical_batch_size, 2))
    try:
        arm = start(name, settings.seeds[0], settings, plan, task, batch_size=_EXAMPLES)
        tried = 0
        with arm.batches() as batches:
            for each in batches:
                batch = Batch.of(each, arm.device)
                if arm.engine or batch.size:
                    step(arm, batch)
                tried += batch.size
                if tried >= _ENOUGH and not arm.in_step:
                    break
    except CoverageError as error:
        return " ".join(str(error).split())
    except UnsupportedModuleError as error:
        found = error.args[0] if isinstance(error.args[0], list) else error.args
        return " ".join(f"Opacus: {'; '.join(map(str, found))}".split())
    except Exception as error:
        # Some errors print whole tensors.
        return textwrap.shorten(in_one_line(error), 500, placeholder=" ...")
    return ""


def _require_classes(path: str, outputs: Any, targets: Any) -> None:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    probabilities = targets.shape == outputs.shape and outputs.dim() > 1 and outputs.shape[1] > 1
    if targets.is_floating_point() and not probabilities:
        raise UsageError(
            f"{path}: the targets are {targets.dtype}, and cross-entropy, the loss without --loss, "
            "takes classes in torch.int64: convert them, or name a --loss, as torch.nn:MSELoss"
        )
