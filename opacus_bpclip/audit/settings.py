"""What an audit's command line asks for."""

from __future__ import annotations

import itertools
import os
import re
import zlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter
from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from opacus_bpclip.config import Allocation, Bound
from opacus_bpclip.jobs.settings import Options, Output
from opacus_bpclip.jobs.values import (
    HOW_TO_RUN,
    Count,
    OrNone,
    Positive,
    Probability,
    Seed,
    Several,
)

Layer = Literal["linear", "sequence-linear", "conv", "embedding", "bias"]
Norm = Literal["layer-norm", "rms-norm", "group-norm", "instance-norm"]
SeveralLayers = Literal["branches", "shared", "tied-embedding"]
CaseName = Literal[Layer, Norm, SeveralLayers]
CASE_NAMES: tuple[CaseName, ...] = get_args(CaseName)
# For these, the joint budget and the layerwise ones clip differently.
OF_SEVERAL_LAYERS: tuple[SeveralLayers, ...] = get_args(SeveralLayers)
Reduction = Literal["mean", "sum"]
Threshold = Literal["fixed", "adaptive"]
# How a case is audited: the loss reduction, the bound, the allocation.
Combination = tuple[Reduction, Bound, Allocation]

TRIALS, ALPHA, DELTA = 10_000, 1e-6, 1e-5
FEWEST_TRIALS = 100
# Not 1, so that the audit sees a sensitivity that was squared or left out.
MAX_GRAD_NORM = 0.7
MAX_INPUT_NORM = 3.0


def _enough(trials: int) -> int:
    if trials != 0 and trials < FEWEST_TRIALS:
        raise ValueError(f"must be 0 or at least {FEWEST_TRIALS}")
    return trials


def _all(values: tuple[str, ...], of_model: str) -> tuple[Any, Parameter]:
    """Return a default that is one value for a user's model, and how the help shows it."""
    default = Field(default_factory=lambda given: (of_model,) if given["model"] else values)
    return default, Parameter(show_default=f"{' '.join(values)}; {of_model} for --model")


_ALLOCATIONS, _SHOW_ALLOCATIONS = _all(("joint", "dimension"), "joint")
_BOUNDS, _SHOW_BOUNDS = _all(get_args(Bound), "exact")
_REDUCTIONS, _SHOW_REDUCTIONS = _all(get_args(Reduction), "mean")
_BOTH = get_args(Threshold)
_THRESHOLDS, _SHOW_THRESHOLDS = _all(get_args(Threshold), "fixed")


class Settings(Options):
    """What to audit, and how thoroughly.

    Args:
        target: MODULE:FACTORY of an opacus_bpclip.audit.Target, in place of the cases: training
            code of any kind; for example opacus_bpclip.audit.published:original
        model: MODULE:FACTORY of a model of your own, in place of the cases, trained by this
            package's engine
        input: for --model: an example's shape, as 3x8x8, or MODULE:FUNCTION that makes a batch of N
        vocabulary: for a shape: the inputs are ids below this number
        loss: for --model: MODULE:FUNCTION that is called with the output and the batch's other
            tensors; without it the loss is the worst one, which gives every output any gradient
        case: some of the built-in cases
        allocation: how budgets are split
        bound: how gradients are bounded
        loss_reduction: how losses are reduced
        threshold: whether thresholds follow a quantile, where layers clip by themselves with each
            layer's noise scaled, and unclipped gradients for the layers below; with sums only, and
            for cases of one layer if named alone
        max_grad_norm: joint L2 sensitivity
        max_input_norm: a number, none or usual: none for joint budgets, as in training, and 3 where
            the product bound or a layerwise budget is to show that inputs are clipped
        full: run the statistical checks on every combination of a case, not only on one
        trials: one-step trials in each world; 0 for the deterministic checks alone
        noise_multiplier: that is claimed
        alpha: probability that one faultless target fails by chance
        delta: at which epsilon is taken
        seed: of everything random
    """

    target: str | None = None
    model: str | None = None
    input: str | None = None
    vocabulary: Count | None = None
    loss: str | None = None
    case: Several[CaseName] = CASE_NAMES
    allocation: Annotated[Several[Allocation], _SHOW_ALLOCATIONS] = _ALLOCATIONS
    bound: Annotated[Several[Bound], _SHOW_BOUNDS] = _BOUNDS
    loss_reduction: Annotated[Several[Reduction], _SHOW_REDUCTIONS] = _REDUCTIONS
    threshold: Annotated[Several[Threshold], _SHOW_THRESHOLDS] = _THRESHOLDS
    max_grad_norm: Positive = MAX_GRAD_NORM
    max_input_norm: OrNone[Positive | Literal["usual"]] = "usual"
    full: bool = False
    trials: Annotated[int, AfterValidator(_enough)] = TRIALS
    noise_multiplier: Positive = 1.0
    alpha: Probability = ALPHA
    delta: Probability = DELTA
    seed: Seed = 0

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        shape = self.input if self.input and ":" not in self.input else None
        if shape:
            shape_of(shape)
        mistakes = {
            "--bound product needs a number for --max-input-norm": (
                self.max_input_norm is None and "product" in self.bound
            ),
            "--target and --model are two ways to name what is audited: give one": (
                self.target and self.model
            ),
            "--case names built-in cases: leave it out for --target or --model": (
                self.case != CASE_NAMES and (self.target or self.model)
            ),
            "--model needs --input, an example's shape or MODULE:FUNCTION": (
                self.model and not self.input
            ),
            "--loss, --input and --vocabulary go with --model MODULE:FACTORY": (
                (self.loss or self.input or self.vocabulary) and not self.model
            ),
            "--loss needs targets: give --input MODULE:FUNCTION, which makes batches of inputs "
            "and targets": shape and self.loss,
            "--threshold adaptive needs --loss-reduction sum": (
                self.threshold == ("adaptive",) and "sum" not in self.loss_reduction
            ),
            "--vocabulary goes with an --input that is a shape": self.vocabulary and not shape,
        }
        for text, made in mistakes.items():
            if made:
                raise ValueError(text)
        return self


class AuditOutput(Output):
    """Where the results of an audit go.

    Args:
        plot: draw histograms of both worlds' scores into this file (needs matplotlib)
        processes: targets audited at the same time, one thread each
    """

    processes: Annotated[Count, HOW_TO_RUN, Parameter(show_default="one for each core")] = (
        os.cpu_count() or 1
    )


@dataclass(frozen=True)
class Task:
    """One target to audit.

    Args:
        name: what the report calls it.
        case: a built-in case, or ``None`` for the user's own.
        allocation: of the clipping; empty for ``--target``, which this package does not clip.
        bound: of the clipping; empty for ``--target``.
        loss_reduction: of the loss; empty for ``--target``.
        threshold: of the clipping; empty for ``--target``.
        trials: one-step trials in each world; 0 for the deterministic checks alone.
    """

    name: str
    case: str | None
    allocation: str
    bound: str
    loss_reduction: str
    threshold: str
    trials: int

    def seed(self, seed: int) -> int:
        """Return this target's seed, another one for each: then their results are independent."""
        return zlib.crc32(f"{seed} {self.name}".encode())


def tasks(settings: Settings) -> list[Task]:
    """Return what is to be audited, in the report's order.

    Without ``full``, a case has its statistical audit in one combination of bound, loss and
    allocation; the combinations take turns. A case of several layers has it with every allocation.
    """
    if settings.target:
        return [Task(settings.target, None, "", "", "", "", settings.trials)]
    combinations = list(
        itertools.product(settings.loss_reduction, settings.bound, settings.allocation)
    )
    found = []
    for name in (settings.model,) if settings.model else settings.case:
        case = None if settings.model else name
        turns = combinations if settings.full or not case else _turns(case, combinations)
        for combination in combinations:
            reduction, bound, allocation = combination
            trials = settings.trials if combination in turns else 0
            label = f"{name}, {allocation}, {bound}, {reduction}"
            if "fixed" in settings.threshold:
                found.append(Task(label, case, allocation, bound, reduction, "fixed", trials))
            # Where both are named, moving ones are for the cases of several layers, in their turns.
            everywhere = settings.threshold != _BOTH or settings.full
            turn = bound in {own for _, own, _ in turns}
            if (
                "adaptive" in settings.threshold
                and reduction == "sum"  # a plain mean is refused, see `make_private`
                and (everywhere or (turn and case in OF_SEVERAL_LAYERS))
            ):
                trials = settings.trials if turn else 0
                named = f"{label}, adaptive"
                found.append(Task(named, case, allocation, bound, reduction, "adaptive", trials))
    return found


def _turns(case: str, combinations: list[Combination]) -> list[Combination]:
    """Return the combinations in which a case has its statistical audit."""
    turn = combinations[list[str](CASE_NAMES).index(case) % len(combinations)]
    if case in OF_SEVERAL_LAYERS:
        return [other for other in combinations if other[:2] == turn[:2]]
    return [turn]


def shape_of(text: str) -> tuple[int, ...]:
    """Return the shape that a text such as ``3x8x8`` stands for.

    Raises:
        ValueError: it stands for none.

    Example:
        >>> shape_of("3x8x8")
        (3, 8, 8)
    """
    if not re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*)*", text):
        raise ValueError(f"--input must be a shape such as 3x8x8, or MODULE:FUNCTION, not {text!r}")
    return tuple(map(int, text.split("x")))
