"""What is learnt and by what, which all arms share: everything that a user may bring."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from opacus_bpclip.ab.augmenting import Augmentation
from opacus_bpclip.ab.criterion import Criterion
from opacus_bpclip.ab.metrics import Accuracy, MeanLoss, metric_of
from opacus_bpclip.ab.optimizing import MakeOptimizer, MakeSchedule, optimizer_of, schedule_of
from opacus_bpclip.ab.results import Measure
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.jobs.errors import UsageError, told_of_users_code
from opacus_bpclip.jobs.loading import load_object, made
from opacus_bpclip.probe.randomness import repeatable


@dataclass(frozen=True)
class Task:
    """A model, data, and what training takes besides.

    Args:
        model: makes a model; weights that are drawn come from torch's global generator.
        train: the training set.
        test: the test set.
        collate: makes a batch of items; None for torch's own.
        criterion: the loss.
        metric: an empty one, to be copied.
        measure: what a report says of the metric.
        optimizer: makes the optimizer of parameters.
        schedule: makes the schedule of an optimizer and a number of steps; None without one.
        augmentation: how training examples are transformed; None if they are not.
    """

    model: Callable[[], nn.Module]
    train: Any
    test: Any
    collate: Callable[[list[Any]], Any] | None
    criterion: Criterion
    metric: Any
    measure: Measure
    optimizer: MakeOptimizer
    schedule: MakeSchedule | None
    augmentation: Augmentation | None = None

    def new_model(self) -> nn.Module:
        """Return a model that trains on the loader's batches."""
        model = self.model()
        return self.augmentation.of_model(model) if self.augmentation else model

    def augmented(self) -> Any:
        """Return the training set as it is trained on; random numbers are torch's global ones."""
        return self.augmentation.of_data(self.train) if self.augmentation else self.train

    def loader(
        self, batch_size: int, *, generator: torch.Generator | None = None
    ) -> DataLoader[Any]:
        """Return an ordinary loader of the training set."""
        train = self.augmented()
        return DataLoader(train, batch_size, collate_fn=self.collate, generator=generator)

    def test_batches(self, batch_size: int) -> DataLoader[Any]:
        """Return a loader of the test set."""
        return DataLoader(self.test, batch_size, collate_fn=self.collate)

    def new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of a model's trainable parameters."""
        return self.optimizer([p for p in model.parameters() if p.requires_grad])


def task_of(settings: Settings, objects: Mapping[str, Any] | None = None) -> Task:
    """Load or make what the settings name.

    Args:
        settings: names, as MODULE:NAME.
        objects: by the settings' fields, what stands in the place of what would be loaded.

    Raises:
        UsageError: something cannot be loaded or made, or is of another kind.
    """
    given = dict(objects or {})
    model_path, data_path = settings.factories

    def found(field: str, path: str | None) -> Any:
        own = given.get(field)
        # What has no module is torch's own, where that is meant.
        theirs = field in ("optimizer", "schedule") and ":" not in (path or "")
        return load_object(path) if own is None and path and not theirs else own

    model = found("model", model_path)
    # Each arm has a process of its own, which makes the data anew: the same, however it is drawn.
    with repeatable(torch.device("cpu")):
        train, test = _sets(found("data", data_path), data_path, settings.data_root)
    loss = _made(found("loss", settings.loss), settings.loss)
    criterion = Criterion(loss or nn.CrossEntropyLoss(), settings.loss or "--loss")
    if settings.metric:
        own = _made(found("metric", settings.metric), settings.metric)
        metric, measure = metric_of(own, settings.metric, lower_is_better=settings.lower_is_better)
    elif loss is None:
        metric, measure = Accuracy(), Measure("accuracy", percent=True)
    else:
        metric, measure = MeanLoss(criterion), Measure("loss", higher_is_better=False)
    transform = _made(found("transform", settings.transform), settings.transform)
    if transform is not None and not callable(transform):
        raise UsageError(f"{settings.transform} is neither a function of an input nor makes one")
    return Task(
        model=lambda: copy.deepcopy(made(model, model_path, nn.Module)),
        train=train,
        test=test,
        collate=found("collate", settings.collate),
        criterion=criterion,
        metric=metric,
        measure=measure,
        optimizer=optimizer_of(settings, found("optimizer", settings.optimizer)),
        schedule=schedule_of(settings, found("schedule", settings.schedule)),
        augmentation=Augmentation(transform, settings.views) if transform else None,
    )


def _made(found: Any, path: str | None) -> Any:
    """Return what a factory makes; what is no factory, an object or a function, as it is."""
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        inspect.signature(found).bind()
    except (TypeError, ValueError):
        if isinstance(found, type):
            raise UsageError(
                f"{path} is a class that needs arguments: name a function that makes one"
            ) from None
        return found
    with told_of_users_code(str(path)):
        return found()


def _sets(found: Any, path: str, root: Path) -> tuple[Any, Any]:
    if callable(found) and "root" in inspect.signature(found).parameters:
        with told_of_users_code(path):
            found = found(root=root)
    sets = made(found, path, tuple)
    if len(sets) != 2:
        raise UsageError(f"{path} makes a tuple of {len(sets)}, not a training and a test set")
    for name, own in zip(("training", "test"), sets, strict=True):
        by_index = hasattr(own, "__len__") and hasattr(own, "__getitem__")
        if isinstance(own, IterableDataset) or not by_index:
            raise UsageError(
                f"{path}: the {name} set is a {type(own).__name__}, which has no length or no "
                "items by index; Poisson sampling draws items by index: give a "
                "torch.utils.data.Dataset with __len__ and __getitem__"
            )
        if not len(own):
            raise UsageError(f"{path}: the {name} set is empty")
    return sets[0], sets[1]
