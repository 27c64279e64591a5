"""Everything that decides what a comparison measures, checked before it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter
from pydantic import Field, model_validator
from typing_extensions import Self

from opacus_bpclip.config import BackpropClipping, Bound, InputWhitening, PinkNoise
from opacus_bpclip.jobs.settings import Options, Output
from opacus_bpclip.jobs.values import (
    HOW_TO_RUN,
    Count,
    Device,
    NotNegative,
    OrNone,
    Positive,
    Probability,
    Seed,
    Several,
)

# The arms of a built-in data set, and those that another data set or model is tried by as well.
BuiltIn = Literal[
    "non-private",
    "flat",
    "flat+input-clipping",
    "backprop",
    "backprop-layerwise",
    "backprop-whitened",
    "paper",
]
# Opacus's own names. The first three compute what flat clipping does, at other costs.
Mode = Literal["functorch", "ew", "ghost", "per_layer", "adaptive"]
Arm = Literal[BuiltIn, Mode]
ARMS: tuple[Arm, ...] = get_args(BuiltIn)
NON_PRIVATE, FLAT, FLAT_INPUT_CLIPPING, BACKPROP, LAYERWISE, WHITENED, PAPER = ARMS
FUNCTORCH, EXPANDED_WEIGHTS, GHOST, PER_LAYER, ADAPTIVE = MODES = get_args(Mode)
OWN_ARMS: tuple[Arm, ...] = (*ARMS[:3], GHOST, PER_LAYER, ADAPTIVE, *ARMS[3:])

_LIBRARY = BackpropClipping()
_PAPER = BackpropClipping.paper()


@dataclass(frozen=True)
class Defaults:
    """What suits one data set, by name: factories, as for a user's own, and settings.

    ``threads=None`` stands for every core.
    """

    title: str
    model: str
    data: str
    epsilon: float
    epochs: int
    batch_size: int
    lr: float
    threads: int | None = None
    # Of the values of its pixels, roughly, after the constants that normalise them.
    mean: float = 0.0
    deviation: float = 1.0


Dataset = Literal["digits", "mnist", "fashion-mnist", "cifar10"]
_MODELS, _DATA = "opacus_bpclip.ab.models:", "opacus_bpclip.ab.data:"
_CNN26K = f"{_MODELS}cnn26k"
DATASETS: dict[Dataset | None, Defaults] = {
    "digits": Defaults(
        "digits", f"{_MODELS}digits_cnn", f"{_DATA}digits", 3.0, 20, 128, 0.1, 1, 0.3, 0.35
    ),
    "mnist": Defaults("MNIST", _CNN26K, f"{_DATA}mnist", 1.0, 10, 1024, 0.5),
    "fashion-mnist": Defaults(
        "Fashion-MNIST", _CNN26K, f"{_DATA}fashion_mnist", 1.0, 10, 1024, 0.5
    ),
    "cifar10": Defaults("CIFAR-10", f"{_MODELS}cnn550k", f"{_DATA}cifar10", 3.0, 30, 1024, 0.2),
    # A user's own.
    None: Defaults("", "", "", 3.0, 10, 128, 0.1),
}


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _of_dataset(name: str) -> Any:
    """Return a default that is the data set's own."""
    return Field(default_factory=lambda given: getattr(DATASETS[given["dataset"]], name))


def _shown(name: str) -> Parameter:
    """Return what the help says of such a default."""
    own = (f"{key or '--data'} {getattr(values, name):g}" for key, values in DATASETS.items())
    return Parameter(show_default=", ".join(own))


class Settings(Options):
    """The settings of one comparison; every private arm shares all of them.

    Args:
        model: MODULE:FACTORY of a model of your own
        data: MODULE:FACTORY of a training and a test set of your own; --data-root is passed to a
            factory that takes root
        loss: MODULE:FACTORY of a criterion with a reduction, or MODULE:FUNCTION that returns each
            example's loss from outputs and targets
        metric: MODULE:FUNCTION of all outputs and targets of the test set, or MODULE:FACTORY of an
            object with update and compute, as in torchmetrics
        lower_is_better: of a metric that does not say so by a higher_is_better of its own
        collate: MODULE:FUNCTION that makes a batch of items
        transform: MODULE:FUNCTION that transforms one training input at random, or MODULE:FACTORY
            of such a function, as opacus_bpclip.ab.transforms:shifts_and_flips
        views: how often each input of a batch is transformed; the gradients of an example's views
            are averaged before they are clipped, which Opacus's own modes cannot do
        dataset: a built-in data set, with its model
        data_root: folder of the data set's files, which are downloaded if absent
        arms: some of the arms; one that cannot train the model is listed with the reason
        seeds: one training run of every arm for each
        epsilon: target of each private arm after its last epoch, at --delta, at most 100
        delta: the other half of the privacy target
        epochs: passes over the training set, each of ``1 / sample_rate`` Poisson batches
        batch_size: expected number of examples in a batch
        physical_batch_size: largest number of examples that the model sees at once
        optimizer: a class of torch.optim, or MODULE:FACTORY called with parameters and lr
        lr: learning rate
        momentum: momentum, of an optimizer that takes it
        schedule: a class of torch.optim.lr_scheduler whose length is the number of steps, or
            MODULE:FACTORY called with the optimizer and that number
        weight_averaging: judge an exponential moving average of the weights, with this decay in a
            step, as 0.97, in place of the latest weights
        accountant: Opacus's name of the accountant
        device: where to train
        precision: bfloat16 trains by autocast, the arms of this package with a criterion passed to
            ``make_private``
        threads: torch's intra-op threads in the training process
        max_grad_norm: joint L2 sensitivity of the summed gradient
        max_input_norm: largest norm of a column of a layer's input in the arms backprop,
            backprop-layerwise, backprop-whitened and flat+input-clipping, or none: the first three
            then leave inputs as they are, and the last, which cannot do without, takes the paper's
        bound: how backprop and backprop-layerwise bound an example's gradients
        allocation: how backprop-layerwise splits --max-grad-norm over the layers
        normalize: the arms of this package but paper scale gradients up, too
    """

    model: Annotated[str | None, Parameter(show_default="the data set's")] = None
    data: str | None = None
    loss: Annotated[str | None, Parameter(show_default="cross-entropy")] = None
    metric: Annotated[
        str | None, Parameter(show_default="accuracy; with --loss the loss on the test set")
    ] = None
    lower_is_better: bool = False
    collate: str | None = None
    transform: str | None = None
    views: Count = 1
    dataset: Annotated[Dataset | None, Parameter(show_default="digits")] = Field(
        default_factory=lambda given: None if given["data"] else "digits"
    )
    data_root: Path = Path("data")
    arms: Annotated[
        Several[Arm],
        Parameter(show_default=f"{' '.join(ARMS)}; for --model also {' '.join(OWN_ARMS[3:6])}"),
    ] = Field(default_factory=lambda given: OWN_ARMS if given["model"] else ARMS)
    seeds: Several[Seed] = (0, 1, 2)
    # Opacus's search for the noise multiplier does not end for an epsilon far above 100.
    epsilon: Annotated[Positive, Field(le=100), _shown("epsilon")] = _of_dataset("epsilon")
    delta: Probability = 1e-5
    epochs: Annotated[Count, _shown("epochs")] = _of_dataset("epochs")
    batch_size: Annotated[Count, _shown("batch_size")] = _of_dataset("batch_size")
    physical_batch_size: Count | None = None
    optimizer: str = "SGD"
    lr: Annotated[Positive, _shown("lr")] = _of_dataset("lr")
    momentum: Annotated[
        Annotated[NotNegative, Field(lt=1)] | None, Parameter(show_default="0.9 for SGD")
    ] = Field(default_factory=lambda given: 0.9 if given["optimizer"] == "SGD" else None)
    schedule: str | None = None
    weight_averaging: Probability | None = None
    accountant: Literal["prv", "rdp", "gdp"] = "prv"
    device: Device = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: Annotated[
        Count, HOW_TO_RUN, Parameter(show_default="1 for digits, else all cores")
    ] = Field(default_factory=lambda given: DATASETS[given["dataset"]].threads or available_cores())
    max_grad_norm: Positive = 1.0
    max_input_norm: OrNone[Positive] = _LIBRARY.max_input_norm
    bound: Bound = _LIBRARY.bound
    allocation: Literal["equal", "dimension"] = "dimension"
    normalize: bool = _LIBRARY.normalize

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        has_bound = not {BACKPROP, LAYERWISE}.isdisjoint(self.arms)
        mistakes = {
            "--bound product needs a number for --max-input-norm": (
                has_bound and self.bound == "product" and self.max_input_norm is None
            ),
            "--data and --dataset are two ways to name the data: give one": (
                self.data and self.dataset
            ),
            "--data needs --model, a model that fits it": self.data and not self.model,
            "--views needs --transform: without one, all views of an input would be equal": (
                self.views > 1 and not self.transform
            ),
        }
        for text, made in mistakes.items():
            if made:
                raise ValueError(text)
        return self

    @property
    def title(self) -> str:
        """The data's name for human eyes."""
        name = self.data or DATASETS[self.dataset].title
        return f"{name} with {self.model}" if self.model else name

    @property
    def factories(self) -> tuple[str, str]:
        """Where the model and the data come from, each as MODULE:FACTORY."""
        own = DATASETS[self.dataset]
        return self.model or own.model, self.data or own.data

    @property
    def is_private(self) -> bool:
        """Whether any arm is private."""
        return any(arm != NON_PRIVATE for arm in self.arms)

    def backprop(self, arm: str) -> BackpropClipping | None:
        """Return an arm's options of backpropagation clipping; None where it clips otherwise."""
        if arm == PAPER:
            return _PAPER
        if arm not in (BACKPROP, LAYERWISE, WHITENED):
            return None
        own = DATASETS[self.dataset]
        noise = PinkNoise(mean=own.mean, deviation=own.deviation)
        return BackpropClipping(
            whitening=InputWhitening(noise) if arm == WHITENED else None,
            allocation=self.allocation if arm == LAYERWISE else _LIBRARY.allocation,
            bound="exact" if arm == WHITENED else self.bound,
            max_input_norm=self.max_input_norm,
            normalize=self.normalize,
        )

    def input_norm(self, arm: str) -> float | None:
        """Return the norm that an arm clips its layers' inputs to; None where it does not."""
        if arm == FLAT_INPUT_CLIPPING:
            return self.max_input_norm or _PAPER.max_input_norm
        backprop = self.backprop(arm)
        return backprop.max_input_norm if backprop else None


class ComparisonOutput(Output):
    """Where a comparison writes; it plots unless it is told not to.

    Args:
        plot: draw the metric over epsilon into this file, or none (needs matplotlib)
    """

    plot: OrNone[Path] = Path("opacus-bpclip-ab.png")
