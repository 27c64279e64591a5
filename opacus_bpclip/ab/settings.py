"""Everything that decides what a comparison measures, checked before it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter
from pydantic import Field, model_validator
from typing_extensions import Self

from opacus_bpclip.config import BackpropClipping, Bound
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

Arm = Literal[
    "non-private", "flat", "flat+input-clipping", "backprop", "backprop-layerwise", "paper"
]
ARMS: tuple[Arm, ...] = get_args(Arm)
NON_PRIVATE, FLAT, FLAT_INPUT_CLIPPING, BACKPROP, LAYERWISE, PAPER = ARMS

_LIBRARY = BackpropClipping()
_PAPER = BackpropClipping.paper()


@dataclass(frozen=True)
class DatasetDefaults:
    """The settings that suit one dataset; ``threads=None`` stands for every core."""

    title: str
    epsilon: float
    epochs: int
    batch_size: int
    lr: float
    threads: int | None = None


Dataset = Literal["digits", "mnist", "fashion-mnist", "cifar10"]
DATASETS: dict[Dataset, DatasetDefaults] = {
    "digits": DatasetDefaults("digits", epsilon=3.0, epochs=20, batch_size=128, lr=0.1, threads=1),
    "mnist": DatasetDefaults("MNIST", epsilon=1.0, epochs=10, batch_size=1024, lr=0.5),
    "fashion-mnist": DatasetDefaults(
        "Fashion-MNIST", epsilon=1.0, epochs=10, batch_size=1024, lr=0.5
    ),
    "cifar10": DatasetDefaults("CIFAR-10", epsilon=3.0, epochs=30, batch_size=1024, lr=0.2),
}


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _of_dataset(name: str) -> Any:
    """Return a default that is the dataset's own."""
    return Field(default_factory=lambda given: getattr(DATASETS[given["dataset"]], name))


def _shown(name: str) -> Parameter:
    """Return what the help says of such a default."""
    own = (f"{dataset} {getattr(values, name):g}" for dataset, values in DATASETS.items())
    return Parameter(show_default=", ".join(own))


class Settings(Options):
    """The settings of one comparison; every private arm shares all of them.

    Args:
        dataset: what is learnt
        data_root: folder of the dataset's files, which are downloaded if absent
        arms: some of the arms
        seeds: one training run of every arm for each
        epsilon: target of each private arm after its last epoch, at --delta, at most 100
        delta: the other half of the privacy target
        epochs: passes over the training set, each of ``1 / sample_rate`` Poisson batches
        batch_size: expected number of examples in a batch
        lr: learning rate of SGD
        momentum: momentum of SGD
        accountant: Opacus's name of the accountant
        device: where to train
        precision: bfloat16 trains by autocast, the arms of this package with a criterion passed to
            ``make_private``
        threads: torch's intra-op threads in the training process
        max_grad_norm: joint L2 sensitivity of the summed gradient
        max_input_norm: largest norm of a column of a layer's input in the arms backprop,
            backprop-layerwise and flat+input-clipping, or none: the first two then leave inputs as
            they are, and the third, which cannot do without, takes the paper's
        bound: how backprop and backprop-layerwise bound an example's gradients
        allocation: how backprop-layerwise splits --max-grad-norm over the layers
        normalize: backprop and backprop-layerwise scale gradients up, too
    """

    dataset: Dataset = "digits"
    data_root: Path = Path("data")
    arms: Several[Arm] = ARMS
    seeds: Several[Seed] = (0, 1, 2)
    # Opacus's search for the noise multiplier does not end for an epsilon far above 100.
    epsilon: Annotated[Positive, Field(le=100), _shown("epsilon")] = _of_dataset("epsilon")
    delta: Probability = 1e-5
    epochs: Annotated[Count, _shown("epochs")] = _of_dataset("epochs")
    batch_size: Annotated[Count, _shown("batch_size")] = _of_dataset("batch_size")
    lr: Annotated[Positive, _shown("lr")] = _of_dataset("lr")
    momentum: Annotated[NotNegative, Field(lt=1)] = 0.9
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
    def _bound_has_its_norm(self) -> Self:
        has_bound = not {BACKPROP, LAYERWISE}.isdisjoint(self.arms)
        if has_bound and self.bound == "product" and self.max_input_norm is None:
            raise ValueError("--bound product needs a number for --max-input-norm")
        return self

    @property
    def title(self) -> str:
        """The dataset's name for human eyes."""
        return DATASETS[self.dataset].title

    @property
    def is_private(self) -> bool:
        """Whether any arm is private."""
        return any(arm != NON_PRIVATE for arm in self.arms)

    def backprop(self, arm: str) -> BackpropClipping | None:
        """Return an arm's options of backpropagation clipping; None where it clips otherwise."""
        if arm == PAPER:
            return _PAPER
        if arm not in (BACKPROP, LAYERWISE):
            return None
        return BackpropClipping(
            allocation=self.allocation if arm == LAYERWISE else _LIBRARY.allocation,
            bound=self.bound,
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
        plot: draw accuracy over epsilon into this file, or none (needs matplotlib)
    """

    plot: OrNone[Path] = Path("opacus-bpclip-ab.png")
