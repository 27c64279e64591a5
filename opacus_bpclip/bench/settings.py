"""What can be measured, and what a run measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

from cyclopts import Parameter
from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from opacus_bpclip.jobs.settings import Options, Output
from opacus_bpclip.jobs.values import HOW_TO_RUN, Count, Device, Distinct, NotNegative, Several

NON_PRIVATE, _COMPILED = "non-private", "-compiled"
# The budget, then the bound. The first is what a user gets who names neither.
_BOUNDS = ("exact", "weighted", "product")
BACKPROP = tuple(f"{budget}-{bound}" for budget in ("joint", "layerwise") for bound in _BOUNDS)
DEFAULT = BACKPROP[0]
OPACUS = ("hooks", "functorch", "ew", "ghost")
COMPILED = tuple(f"{arm}{_COMPILED}" for arm in (NON_PRIVATE, *BACKPROP))
ARMS = (NON_PRIVATE, *BACKPROP, *OPACUS, *COMPILED)
if TYPE_CHECKING:
    Arm = str
else:
    Arm = Literal[ARMS]


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
Accepted = Literal["cnn26k", "resnet18-gn", "transformer", "mlp", "transformer-512"]
CaseName = Literal[Accepted, "cnn26k-2048", "text", "lstm", "lora"]
CASES: dict[CaseName, Case] = {
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
ACCEPTANCE: tuple[CaseName, ...] = get_args(Accepted)


class Growth(NamedTuple):
    """A curve: one size of a case takes one value after another."""

    case: CaseName
    field: str
    values: tuple[int, ...]


GrowthName = Literal["batch", "width", "depth", "length"]
GROWTHS: dict[GrowthName, Growth] = {
    "batch": Growth("cnn26k", "batch_size", (16, 64, 256, 1024, 4096)),
    "width": Growth("mlp", "width", (128, 256, 512, 1024, 2048)),
    "depth": Growth("transformer", "depth", (1, 2, 4, 8)),
    "length": Growth("transformer", "length", (16, 32, 64, 128, 256, 512)),
}
# Without `functorch` and `ew`, which nobody uses for speed, and the bound that is never tighter.
_GROWTH_ARMS = (NON_PRIVATE, *BACKPROP[0:2], *BACKPROP[3:5], "hooks", "ghost")
# Rounds of a comparison that are taken whatever the limit.
LEAST_ROUNDS = 6
Key = tuple[CaseName, GrowthName | None, int | None]


@dataclass(frozen=True)
class Point:
    """What one comparison is of.

    Args:
        name: of the case, in `CASES`.
        axis: of the growth curve it is on, in `GROWTHS`; None for a case by itself.
        case: with the sizes that are measured.
    """

    name: CaseName
    axis: GrowthName | None
    case: Case

    @property
    def key(self) -> Key:
        """What tells this comparison from others of the same record."""
        field = GROWTHS[self.axis].field if self.axis else None
        return self.name, self.axis, getattr(self.case, field) if field else None

    @property
    def title(self) -> str:
        """The case's name for human eyes, with all sizes."""
        sizes = "".join(f", {name} {value:,}" for name, value in self.case.sizes.items())
        return f"{self.case.title}, batch {self.case.batch_size}{sizes}"


def _every_case(value: Any) -> Any:
    return tuple(CASES) if tuple(value) == ("all",) else value


class Settings(Options):
    """What to measure, and how.

    Args:
        growth: a growth curve in place of cases: the size that grows
        case: all, or some of the cases
        arms: some of the arms, each with the one that its ratios are to
        rounds: steps of every arm that count, at most
        limit: seconds after which no round of a comparison begins, once there are 6
        processes: that share the rounds, one after the other: where the system puts a process's
            memory decides some hundredths of a ratio
        threads: torch's intra-op threads
        device: where to train
        precision: of what a model computes; bfloat16 by autocast, with losses that are summed and
            parameters in float32
    """

    growth: GrowthName | None = None
    case: Annotated[
        Distinct[CaseName],
        BeforeValidator(_every_case),
        Parameter(show_default=" ".join(ACCEPTANCE)),
    ] = Field(default_factory=lambda given: () if given["growth"] else ACCEPTANCE)
    arms: Annotated[
        Several[Arm], Parameter(show_default=f"all; for a growth curve {' '.join(_GROWTH_ARMS)}")
    ] = Field(default_factory=lambda given: _GROWTH_ARMS if given["growth"] else ARMS)
    rounds: Count = 40
    limit: NotNegative = 60.0
    processes: Annotated[Count, HOW_TO_RUN] = 3
    threads: Annotated[Count, HOW_TO_RUN] = 1
    device: Device = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.growth and self.case:
            raise ValueError("--growth has a case of its own: leave --case out")
        if not self.growth and not self.case:
            raise ValueError("--case must name something")
        for arm in self.arms:
            if base_of(arm) not in self.arms:
                raise ValueError(f"--arms {arm} needs {base_of(arm)}, which its ratios are to")
        return self

    @property
    def points(self) -> list[Point]:
        """What is to be compared: the cases, or a growth curve's points."""
        if self.growth is None:
            return [Point(name, None, CASES[name]) for name in self.case]
        curve = GROWTHS[self.growth]
        base = CASES[curve.case]
        changed: list[dict[str, Any]] = [{curve.field: value} for value in curve.values]
        return [Point(curve.case, self.growth, replace(base, **change)) for change in changed]

    @property
    def shares(self) -> list[Self]:
        """The same settings for each process, which takes its share of the rounds.

        Example:
            >>> [share.rounds for share in Settings(rounds=8).shares]
            [3, 3, 2]
        """
        number = min(self.processes, self.rounds)
        return [
            self.replace(
                processes=number,
                rounds=self.rounds // number + (index < self.rounds % number),
                limit=self.limit / number,
            )
            for index in range(number)
        ]

    @property
    def least_rounds(self) -> int:
        """The rounds of each process that are taken whatever the limit."""
        return -(-LEAST_ROUNDS // self.processes)


class BenchOutput(Output):
    """Where a run reads and writes.

    Args:
        plot: draw the growth curves into this file (needs matplotlib)
        from_json: start from the results in this file: add to them what is measured now, or render
            them if nothing else is asked for
        update: rewrite the generated blocks of these documents
    """

    from_json: Annotated[Path | None, HOW_TO_RUN] = None
    update: tuple[Path, ...] = ()


def base_of(arm: str) -> Arm:
    """Return the arm that an arm's ratios are to: compiled arms have a compiled one."""
    return COMPILED[0] if is_compiled(arm) else NON_PRIVATE


def is_compiled(arm: str) -> bool:
    """Return whether an arm's model goes through ``torch.compile``."""
    return arm.endswith(_COMPILED)


def method_of(arm: str) -> str:
    """Return how an arm trains, without whether it is compiled."""
    return arm.removesuffix(_COMPILED)
