"""What is tried before anything trains: the user's own parts, then each arm, on a few examples."""

from __future__ import annotations

import copy
import textwrap
from typing import Any

import torch
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from opacus_bpclip.ab.arms import Arm
from opacus_bpclip.ab.batches import Batch, logits_in
from opacus_bpclip.ab.criterion import Criterion
from opacus_bpclip.ab.results import Plan
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.task import Task
from opacus_bpclip.ab.training import evaluate, start, step
from opacus_bpclip.errors import CoverageError
from opacus_bpclip.jobs.errors import UsageError, in_one_line, told_of_users_code
from opacus_bpclip.jobs.quiet import known_warnings_silenced
from opacus_bpclip.probe.rows import rows_are_coupled

_EXAMPLES = 8
# In a draw of a batch of 8, or in a few.
_ENOUGH = 4
# An empty batch is tried where a run draws one with at least this probability.
_MAY_BE_EMPTY = 1e-3


@known_warnings_silenced()
def check(task: Task, settings: Settings) -> None:
    """Take a step without privacy, and evaluate the model once on the whole test set.

    Raises:
        UsageError: something raises; the text names it.
    """
    device = torch.device(settings.device)
    model_path, data_path = settings.factories
    with told_of_users_code(model_path):
        model = task.new_model().to(device)
        if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
            raise UsageError(
                f"{model_path} has lazy layers: run a batch through the model before you return it"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise UsageError(f"{model_path} has no trainable parameter")
    if task.augmentation:
        with told_of_users_code(f"--transform {settings.transform}"):
            task.augmented()[0]
    with told_of_users_code(data_path):
        batch = Batch.of(next(iter(task.loader(_EXAMPLES))), device)
    with told_of_users_code(f"{model_path} on a batch of {data_path}"):
        outputs = batch.outputs_of(model)
    if not settings.loss:
        _require_classes(data_path, logits_in(outputs), batch.targets)
    with told_of_users_code(f"the loss {settings.loss or 'cross-entropy'} on a batch"):
        task.criterion.to(device)(outputs, batch.targets).backward()
        _require_own_losses(task.criterion, outputs, batch)
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
    if settings.physical_batch_size and name == "adaptive":
        return (
            "Opacus's adaptive clipping counts the examples of the last part only: leave out "
            "--physical-batch-size"
        )
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
        if arm.engine and _empty_batches(settings, plan) >= _MAY_BE_EMPTY:
            return _problem_of_empty(arm, batch.part(slice(0)))
    except CoverageError as error:
        return " ".join(str(error).split())
    except UnsupportedModuleError as error:
        found = error.args[0] if isinstance(error.args[0], list) else error.args
        return " ".join(f"Opacus: {'; '.join(map(str, found))}".split())
    except Exception as error:
        return _short(error)
    return ""


def _empty_batches(settings: Settings, plan: Plan) -> float:
    """Return how many empty batches an arm draws on average."""
    steps = len(settings.seeds) * settings.epochs * plan.steps_per_epoch
    return steps * (1 - plan.sample_rate) ** plan.train_examples


def _problem_of_empty(arm: Arm, empty: Batch) -> str:
    try:
        step(arm, empty)
    except Exception as error:
        return (
            "Poisson sampling draws empty batches at this --batch-size, and the arm fails on one: "
            f"{_short(error)}. Raise --batch-size"
        )
    return ""


def _short(error: Exception) -> str:
    # Some errors print whole tensors.
    return textwrap.shorten(in_one_line(error), 500, placeholder=" ...")


def _require_own_losses(criterion: Criterion, outputs: Any, batch: Batch) -> None:
    each = copy.deepcopy(criterion)
    each.reduction = "none"
    if rows_are_coupled(each, (outputs, batch.targets), {}, batch.size):
        raise UsageError(
            f"{criterion.path} couples examples: an example's loss changes when others are left "
            "out of the batch, so no clipping would bound what it contributes. Compute each "
            "example's loss from that example alone"
        )


def _require_classes(path: str, outputs: Any, targets: Any) -> None:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    probabilities = targets.shape == outputs.shape and outputs.dim() > 1 and outputs.shape[1] > 1
    if targets.is_floating_point() and not probabilities:
        raise UsageError(
            f"{path}: the targets are {targets.dtype}, and cross-entropy, the loss without --loss, "
            "takes classes in torch.int64: convert them, or name a --loss, as torch.nn:MSELoss"
        )
