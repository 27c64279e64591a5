"""What an audit's command line asks for; imports no torch."""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from opacus_bpclip.config import Allocation, Bound
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.values import (
    require_at_least_one,
    require_choice,
    require_distinct,
    require_positive,
    require_probability,
)

CASE_NAMES = (
    "linear",
    "sequence-linear",
    "conv",
    "embedding",
    "bias",
    "layer-norm",
    "rms-norm",
    "group-norm",
    "instance-norm",
    "branches",
    "shared",
)
# Where the two ways to spend the budget differ.
OF_SEVERAL_LAYERS = ("branches", "shared")
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)
BOTH_BUDGETS = ("joint", "dimension")
BOUNDS: tuple[str, ...] = get_args(Bound)
REDUCTIONS = ("mean", "sum")

TRIALS, ALPHA, DELTA = 10_000, 1e-6, 1e-5
FEWEST_TRIALS = 100
# Not 1: a sensitivity that was squared or left out must show.
MAX_GRAD_NORM = 0.7
MAX_INPUT_NORM = 3.0


@dataclass(frozen=True)
class Settings:
    """What to audit, and how thoroughly.

    Args:
        cases: built-in cases.
        allocations: of the clipping.
        bounds: of the clipping.
        loss_reductions: of the loss.
        full: audit every combination statistically, not one for each case.
        noise_multiplier: claimed.
        max_grad_norm: joint L2 sensitivity.
        max_input_norm: of the clipping; ``"usual"`` is none for joint budgets, as in training, and
            3 where the product bound or a layerwise budget is to show that inputs are clipped.
        trials: one-step trials in each world; 0 leaves the statistical checks out.
        alpha: chance of one faultless target to be convicted by chance.
        delta: at which epsilon is compared.
        seed: of everything random.
        target: ``module:factory`` of a `Target`, in place of the cases.
        model: ``module:factory`` of a model, likewise.
        loss: ``module:function`` for that model.
        input: ``module:function`` that makes a batch for it, or an example's shape, as ``3x8x8``.
        vocabulary: number of token ids, where the shape is one of ids.

    Raises:
        UsageError: a value that makes no sense; the text names the option.
    """

    cases: tuple[str, ...] = CASE_NAMES
    allocations: tuple[str, ...] = BOTH_BUDGETS
    bounds: tuple[str, ...] = BOUNDS
    loss_reductions: tuple[str, ...] = REDUCTIONS
    full: bool = False
    noise_multiplier: float = 1.0
    max_grad_norm: float = MAX_GRAD_NORM
    max_input_norm: float | Literal["usual"] | None = "usual"
    trials: int = TRIALS
    alpha: float = ALPHA
    delta: float = DELTA
    seed: int = 0
    target: str | None = None
    model: str | None = None
    loss: str | None = None
    input: str | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        _require_some_of("--case", self.cases, CASE_NAMES)
        _require_some_of("--allocation", self.allocations, ALLOCATIONS)
        _require_some_of("--bound", self.bounds, BOUNDS)
        _require_some_of("--loss-reduction", self.loss_reductions, REDUCTIONS)
        require_positive("--noise-multiplier", self.noise_multiplier)
        require_positive("--max-grad-norm", self.max_grad_norm)
        if self.max_input_norm != "usual":
            require_positive("--max-input-norm", self.max_input_norm)
        require_probability("--alpha", self.alpha)
        require_probability("--delta", self.delta)
        if self.trials != 0 and self.trials < FEWEST_TRIALS:
            raise UsageError(f"--trials must be 0 or at least {FEWEST_TRIALS}, not {self.trials}")
        if self.seed < 0:
            raise UsageError(f"--seed must be 0 or above, not {self.seed}")
        if self.max_input_norm is None and "product" in self.bounds:
            raise UsageError("--bound product needs a number for --max-input-norm")
        self._check_users_own()

    def _check_users_own(self) -> None:
        if self.target and self.model:
            raise UsageError("--target and --model are two ways to name what is audited: give one")
        if self.model and not self.input:
            raise UsageError("--model needs --input, an example's shape or MODULE:FUNCTION")
        for option, value in (
            ("--loss", self.loss),
            ("--input", self.input),
            ("--vocabulary", self.vocabulary),
        ):
            if value and not self.model:
                raise UsageError(f"{option} goes with --model MODULE:FACTORY")
        if self.input and ":" not in self.input:
            shape_of(self.input)
            if self.loss:
                raise UsageError(
                    "--loss needs targets: give --input MODULE:FUNCTION, which makes batches of "
                    "inputs and targets"
                )
        elif self.vocabulary:
            raise UsageError("--vocabulary goes with an --input that is a shape")
        if self.vocabulary is not None:
            require_at_least_one("--vocabulary", self.vocabulary)


@dataclass(frozen=True)
class Task:
    """One target to audit.

    Args:
        name: what the report calls it.
        case: a built-in case, or ``None`` for the user's own.
        allocation: of the clipping; empty for a target, which clips as it likes.
        bound: of the clipping; likewise.
        loss_reduction: of the loss; likewise.
        trials: one-step trials in each world; 0 for the deterministic checks alone.
    """

    name: str
    case: str | None
    allocation: str
    bound: str
    loss_reduction: str
    trials: int

    def seed(self, seed: int) -> int:
        """Return this target's own seed: with one for all, one lucky draw would serve them all."""
        return zlib.crc32(f"{seed} {self.name}".encode())


def tasks(settings: Settings) -> list[Task]:
    """Return what is to be audited, in the report's order.

    Without ``full``, a case has its statistical audit in one combination of bound, loss and
    allocation; the combinations take turns. A case of several layers has it with every allocation.
    """
    if settings.target:
        return [Task(settings.target, None, "", "", "", settings.trials)]
    names = [settings.model] if settings.model else list(settings.cases)
    found = []
    for name in names:
        turns = None if settings.full or settings.model else _turns(settings, name)
        for combination in itertools.product(
            settings.loss_reductions, settings.bounds, settings.allocations
        ):
            reduction, bound, allocation = combination
            case = None if settings.model else name
            trials = settings.trials if turns is None or combination in turns else 0
            label = f"{name}, {allocation}, {bound}, {reduction}"
            found.append(Task(label, case, allocation, bound, reduction, trials))
    return found


def _turns(settings: Settings, case: str) -> set[tuple[str, str, str]]:
    """Return the combinations in which a case has its statistical audit."""
    pairs = list(itertools.product(settings.loss_reductions, settings.bounds))
    turn = CASE_NAMES.index(case)
    reduction, bound = pairs[turn % len(pairs)]
    allocations = settings.allocations
    if case not in OF_SEVERAL_LAYERS:
        # Each round through the pairs begins with another one.
        allocations = (allocations[(turn + turn // len(pairs)) % len(allocations)],)
    return {(reduction, bound, allocation) for allocation in allocations}


@dataclass(frozen=True)
class Output:
    """Where the results go.

    Args:
        json: every fact, rewritten after each finished target.
        markdown: the report as a page.
        plot: a histogram of both worlds' scores.
        resume: keep what the json file holds already.
        progress: say on stderr what is finished.
        processes: how many targets to audit at the same time.
    """

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    resume: bool = False
    progress: bool = True
    processes: int = 1


def shape_of(text: str) -> tuple[int, ...]:
    """Return the shape that a text such as ``3x8x8`` stands for.

    Raises:
        UsageError: it stands for none.

    Example:
        >>> shape_of("3x8x8")
        (3, 8, 8)
    """
    try:
        shape = tuple(int(part) for part in text.split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1 or math.prod(shape) < 1:
        raise UsageError(f"--input must be a shape such as 3x8x8, or MODULE:FUNCTION, not {text!r}")
    return shape


def _require_some_of(option: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
    for value in values:
        require_choice(option, value, choices)
    require_distinct(option, values)
