"""Everything that decides what a comparison measures, checked before it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from opacus_bpclip.config import Allocation, BackpropClipping, Bound
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.values import (
    require_at_least_one,
    require_choice,
    require_distinct,
    require_positive,
    require_probability,
    require_some,
)

NON_PRIVATE = "non-private"
FLAT = "flat"
FLAT_INPUT_CLIPPING = "flat+input-clipping"
BACKPROP = "backprop"
LAYERWISE = "backprop-layerwise"
PAPER = "paper"
ARMS = (NON_PRIVATE, FLAT, FLAT_INPUT_CLIPPING, BACKPROP, LAYERWISE, PAPER)

_LIBRARY = BackpropClipping()
_PAPER = BackpropClipping.paper()
LAYERWISE_ALLOCATIONS = tuple(name for name in get_args(Allocation) if name != "joint")

ACCOUNTANTS = ("prv", "rdp", "gdp")
DEVICES = ("cpu", "cuda")
PRECISIONS = ("float32", "bfloat16")

# Opacus's search for the noise multiplier does not end for an epsilon far above this one.
MAX_EPSILON = 100.0


@dataclass(frozen=True)
class DatasetDefaults:
    """The settings that suit one dataset; ``threads=None`` stands for every core."""

    title: str
    epsilon: float
    epochs: int
    batch_size: int
    lr: float
    threads: int | None = None


DATASETS = {
    "digits": DatasetDefaults("digits", epsilon=3.0, epochs=20, batch_size=128, lr=0.1, threads=1),
    "mnist": DatasetDefaults("MNIST", epsilon=1.0, epochs=10, batch_size=1024, lr=0.5),
    "fashion-mnist": DatasetDefaults(
        "Fashion-MNIST", epsilon=1.0, epochs=10, batch_size=1024, lr=0.5
    ),
    "cifar10": DatasetDefaults("CIFAR-10", epsilon=3.0, epochs=30, batch_size=1024, lr=0.2),
}


@dataclass(frozen=True)
class Settings:
    """The settings of one comparison; every private arm shares all of them.

    `settings_for` fills in a dataset's defaults.

    Args:
        dataset: a name in `DATASETS`.
        data_root: folder that holds the dataset's files, or receives them.
        epsilon: target of each private arm after its last epoch, at ``delta``.
        delta: the other half of the privacy target.
        epochs: passes over the training set, each of ``1 / sample_rate`` Poisson batches.
        batch_size: expected number of examples in a batch.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        max_grad_norm: joint L2 sensitivity of the summed gradient.
        max_input_norm: largest norm of a column of a layer's input in the arms ``backprop``,
            ``backprop-layerwise`` and ``flat+input-clipping``; ``None`` leaves the first two's
            inputs as they are, and gives the third, which cannot do without, the paper's.
        bound: how ``backprop`` and ``backprop-layerwise`` bound an example's gradients.
        allocation: how ``backprop-layerwise`` splits ``max_grad_norm`` over the layers.
        normalize: whether ``backprop`` and ``backprop-layerwise`` scale gradients up, too.
        seeds: one training run of every arm for each; no seed twice.
        arms: names in `ARMS`, no arm twice.
        threads: torch's intra-op threads in the training process.
        accountant: Opacus's name of the accountant.
        device: ``"cpu"`` or ``"cuda"``.
        precision: ``"bfloat16"`` trains under autocast, the arms of this package with a criterion
            passed to ``make_private``.

    Raises:
        UsageError: a value outside these; the text names the option.
    """

    dataset: str
    data_root: str
    epsilon: float
    delta: float
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    max_grad_norm: float
    max_input_norm: float | None
    bound: Bound
    allocation: Allocation
    normalize: bool
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    threads: int
    accountant: str
    device: str
    precision: str

    def __post_init__(self) -> None:
        require_choice("--dataset", self.dataset, DATASETS)
        for name in ("epsilon", "lr", "max_grad_norm", "max_input_norm"):
            require_positive(_option(name), getattr(self, name))
        if self.epsilon > MAX_EPSILON:
            raise UsageError(
                f"--epsilon must be at most {MAX_EPSILON:g}, not {self.epsilon:g}: more is no "
                f"privacy; --arms {NON_PRIVATE} trains without any"
            )
        require_probability("--delta", self.delta)
        if not 0 <= self.momentum < 1:
            raise UsageError(f"--momentum must be at least 0 and below 1, not {self.momentum}")
        for name in ("epochs", "batch_size", "threads"):
            require_at_least_one(_option(name), getattr(self, name))
        for name, value, choices in (
            ("--bound", self.bound, get_args(Bound)),
            ("--allocation", self.allocation, LAYERWISE_ALLOCATIONS),
            ("--accountant", self.accountant, ACCOUNTANTS),
            ("--device", self.device, DEVICES),
            ("--precision", self.precision, PRECISIONS),
        ):
            require_choice(name, value, choices)
        self._check_seeds_and_arms()

    def _check_seeds_and_arms(self) -> None:
        for name, values in (("--seeds", self.seeds), ("--arms", self.arms)):
            require_some(name, values)
            require_distinct(name, values)
        if min(self.seeds) < 0:
            raise UsageError(f"--seeds must be 0 or above, not {min(self.seeds)}")
        for arm in self.arms:
            require_choice("--arms", arm, ARMS)
        has_bound = not {BACKPROP, LAYERWISE}.isdisjoint(self.arms)
        if has_bound and self.bound == "product" and self.max_input_norm is None:
            raise UsageError("--bound product needs a number for --max-input-norm")

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


@dataclass(frozen=True)
class Output:
    """Where a comparison writes; nothing in it changes what is measured.

    Args:
        json: file for the results as data, or None.
        plot: file for the plot, or None.
        resume: keep the arms that ``json`` holds already.
        progress: show progress bars on stderr.
    """

    json: Path | None = None
    plot: Path | None = None
    resume: bool = False
    progress: bool = False


def settings_for(dataset: str = "digits", **given: Any) -> Settings:
    """Return a dataset's default settings, replaced by those given.

    Args:
        dataset: a name in `DATASETS`.
        **given: fields of `Settings`.

    Raises:
        UsageError: a setting is wrong.
        TypeError: a name is not a field of `Settings`.

    Example:
        >>> settings_for("mnist", threads=1).batch_size
        1024
    """
    require_choice("--dataset", dataset, DATASETS)
    own = DATASETS[dataset]
    values: dict[str, Any] = {
        "data_root": "data",
        "delta": 1e-5,
        "momentum": 0.9,
        "max_grad_norm": 1.0,
        "max_input_norm": _LIBRARY.max_input_norm,
        "bound": _LIBRARY.bound,
        "allocation": _PAPER.allocation,
        "normalize": _LIBRARY.normalize,
        "seeds": (0, 1, 2),
        "accountant": "prv",
        "device": "cpu",
        "precision": "float32",
        "threads": own.threads or available_cores(),
        "arms": ARMS,
        **{name: getattr(own, name) for name in ("epsilon", "epochs", "batch_size", "lr")},
        **given,
    }
    return Settings(dataset=dataset, **values)


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _option(name: str) -> str:
    assert name in {field.name for field in fields(Settings)}
    return "--" + name.replace("_", "-")
