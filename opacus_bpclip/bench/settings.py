"""What can be measured, and what a run measures; imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.values import (
    require_at_least_one,
    require_choice,
    require_distinct,
    require_some,
)

NON_PRIVATE = "non-private"
# The budget, then the bound. The first is what a user gets who names neither.
JOINT = ("joint-exact", "joint-weighted", "joint-product")
LAYERWISE = ("layerwise-exact", "layerwise-weighted", "layerwise-product")
BACKPROP = JOINT + LAYERWISE
DEFAULT = JOINT[0]
OPACUS = ("hooks", "functorch", "ew", "ghost")
EAGER = (NON_PRIVATE, *BACKPROP, *OPACUS)
_COMPILED = "-compiled"
COMPILED = tuple(name + _COMPILED for name in (NON_PRIVATE, *BACKPROP))
ARMS = EAGER + COMPILED

DEVICES = ("cpu", "cuda")
# Of what a model computes; in the second by autocast, with parameters in float32.
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One model and one batch; a size that the model does not have is None.

    Args:
        title: for human eyes, without the sizes that vary.
        family: a name in `cases.FAMILIES`.
        batch_size: examples in every batch.
        width: features of a hidden layer.
        depth: hidden layers.
        length: positions of an example.
        vocabulary: rows of the embedding.
    """

    title: str
    family: str
    batch_size: int
    width: int | None = None
    depth: int | None = None
    length: int | None = None
    vocabulary: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the model has, by name."""
        every = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        return {name: value for name, value in every.items() if name != "batch_size"}


_ENCODER = Case(
    "transformer encoder", "transformer", 32, width=256, depth=4, length=64, vocabulary=1000
)
CASES = {
    "cnn26k": Case("CNN26k", "cnn26k", 256),
    "resnet18-gn": Case("ResNet-18 with GroupNorm, 32 x 32", "resnet18-gn", 32, width=64),
    "transformer": _ENCODER,
    "mlp": Case("MLP", "mlp", 256, width=2048, depth=2),
    "cnn26k-2048": Case("CNN26k", "cnn26k", 2048),
    "transformer-512": replace(_ENCODER, length=512),
    "text": Case("text classifier", "text", 32, width=128, length=64, vocabulary=50_000),
    "lstm": Case("DPLSTM", "lstm", 32, width=128, length=32),
    "lora": Case(
        "low-rank adapters on an encoder of BERT-base's shape",
        "lora",
        32,
        width=768,
        depth=12,
        length=128,
        vocabulary=30_522,
    ),
}
# The cases that the project's acceptance table names.
ACCEPTANCE = ("cnn26k", "resnet18-gn", "transformer", "mlp", "transformer-512")


@dataclass(frozen=True)
class Growth:
    """A curve: one size of a case takes one value after another."""

    case: str
    field: str
    values: tuple[int, ...]


GROWTHS = {
    "batch": Growth("cnn26k", "batch_size", (16, 64, 256, 1024, 4096)),
    "width": Growth("mlp", "width", (128, 256, 512, 1024, 2048)),
    "depth": Growth("transformer", "depth", (1, 2, 4, 8)),
    "length": Growth("transformer", "length", (16, 32, 64, 128, 256, 512)),
}
# Without `functorch` and `ew`, which nobody uses for speed, and the bound that is never tighter.
_GROWTH_ARMS = (NON_PRIVATE, *JOINT[:2], *LAYERWISE[:2], "hooks", "ghost")


@dataclass(frozen=True)
class Point:
    """What one comparison is of.

    Args:
        name: of the case, in `CASES`.
        axis: of the growth curve it is on, in `GROWTHS`; None for a case by itself.
        case: with the sizes that are measured.
    """

    name: str
    axis: str | None
    case: Case

    @property
    def key(self) -> tuple[str, str | None, int | None]:
        """What tells this comparison from others of the same record."""
        field = GROWTHS[self.axis].field if self.axis else None
        return self.name, self.axis, getattr(self.case, field) if field else None


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        arms: names in `ARMS`, no arm twice; each with its base, see `base_of`.
        rounds: steps of every arm that count, at most.
        limit: seconds after which no round of a comparison begins, once there are `least_rounds`.
        threads: torch's intra-op threads.
        device: ``"cpu"`` or ``"cuda"``.
        processes: that share the rounds, one after the other. Where the system puts a process's
            memory decides some hundredths of a ratio.
        least_rounds: that are taken whatever the limit.
        precision: of the forward pass, in `PRECISIONS`.

    Raises:
        UsageError: a value outside these; the text names the option.
    """

    arms: tuple[str, ...] = ARMS
    rounds: int = 40
    limit: float = 60.0
    threads: int = 1
    device: str = "cpu"
    processes: int = 3
    least_rounds: int = 6
    precision: str = "float32"

    def __post_init__(self) -> None:
        _require_choices("--arms", self.arms, ARMS)
        for arm in self.arms:
            if base_of(arm) not in self.arms:
                raise UsageError(f"--arms {arm} needs {base_of(arm)}, which its ratios are to")
        for name in ("rounds", "threads", "processes"):
            require_at_least_one(f"--{name}", getattr(self, name))
        if not self.limit >= 0:
            raise UsageError(f"--limit must be a number of seconds at least 0, not {self.limit}")
        require_choice("--device", self.device, DEVICES)
        require_choice("--precision", self.precision, PRECISIONS)

    def shares(self) -> list[Settings]:
        """Return what each process measures.

        Example:
            >>> [share.rounds for share in Settings(rounds=8).shares()]
            [3, 3, 2]
        """
        number = min(self.processes, self.rounds)
        return [
            replace(
                self,
                processes=1,
                rounds=self.rounds // number + (index < self.rounds % number),
                limit=self.limit / number,
                least_rounds=-(-self.least_rounds // number),
            )
            for index in range(number)
        ]


@dataclass(frozen=True)
class Output:
    """Where a run reads and writes; nothing in it changes what is measured.

    Args:
        from_json: a results file to start from, or None.
        json: file for the results as data, or None.
        markdown: file for the tables, or None.
        plot: file for the growth curves, or None.
        update: documents whose generated blocks are to be rewritten.
        progress: say on stderr what is being measured.
    """

    from_json: Path | None = None
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    update: tuple[Path, ...] = ()
    progress: bool = False


def base_of(arm: str) -> str:
    """Return the arm that an arm's ratios are to: compiled arms have a compiled one."""
    return NON_PRIVATE + (_COMPILED if is_compiled(arm) else "")


def is_compiled(arm: str) -> bool:
    """Return whether an arm's model goes through ``torch.compile``."""
    return arm.endswith(_COMPILED)


def method_of(arm: str) -> str:
    """Return how an arm trains, without whether it is compiled."""
    return arm.removesuffix(_COMPILED)


def points(cases: Sequence[str], growth: str | None) -> list[Point]:
    """Return what is to be compared: the cases, or a growth curve's points.

    Raises:
        UsageError: an unknown name, or one twice.
    """
    if growth is None:
        _require_choices("--case", cases, CASES)
        return [Point(name, None, CASES[name]) for name in cases]
    require_choice("--growth", growth, GROWTHS)
    curve = GROWTHS[growth]
    base = CASES[curve.case]
    changed: list[dict[str, Any]] = [{curve.field: value} for value in curve.values]
    return [Point(curve.case, growth, replace(base, **change)) for change in changed]


def default_arms(growth: str | None) -> tuple[str, ...]:
    """Return the arms of a run that names none."""
    return ARMS if growth is None else _GROWTH_ARMS


def _require_choices(option: str, values: Sequence[str], choices: Collection[str]) -> None:
    require_some(option, values)
    require_distinct(option, values)
    for value in values:
        require_choice(option, value, choices)
