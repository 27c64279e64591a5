"""What a study asks for, as its file has it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from opacus_bpclip.ab.study.runs import RunSettings
from opacus_bpclip.jobs.settings import Options
from opacus_bpclip.jobs.values import HOW_TO_RUN, Count, Probability, Seed, Several

Table = dict[str, Any]
# What all arms of a cell share, or they would not be compared at equal privacy, on equal data, by
# one measure.
OF_CELLS = frozenset(
    {
        *("dataset", "data", "data_root", "collate", "model"),
        *("loss", "metric", "lower_is_better"),
        *("epsilon", "delta", "accountant"),
    }
)
OF_STUDIES = frozenset({"arms", "seeds", "held_out"})
_NO_TABLE = "must be a table of the options of BackpropClipping"


class Tuning(Options):
    """How the arms' settings are chosen, with as many trials for each arm.

    Args:
        grid: for each arm, by its name in the study, the values to try of some settings, in a table
            ``options`` those of `BackpropClipping`. All combinations are tried.
        held_out: part of the training set that trials are judged by.
        seeds: one run of each trial for each; none of them is published.
    """

    grid: dict[str, Table]
    held_out: Probability = 0.2
    seeds: Several[Seed] = (1000, 1001)

    def points(self, arm: str) -> list[Table]:
        """Return the combinations to try for an arm, each as the settings that it changes."""
        axes = _axes(self.grid.get(arm, {}))
        return [_point(axes, values) for values in itertools.product(*axes.values()) if values]

    @model_validator(mode="after")
    def _of_lists(self) -> Self:
        for arm, table in self.grid.items():
            for path, values in _axes(table).items():
                place = f"grid.{arm}.{'.'.join(path)}"
                if not isinstance(values, list) or not values:
                    raise ValueError(f"{place}: must be a list of values")
                if any(value in values[:index] for index, value in enumerate(values)):
                    raise ValueError(f"{place}: must not name anything twice")
        return self


class Study(Options):
    """Cells times arms times seeds.

    Args:
        title: for human eyes.
        seeds: one run of each arm in each cell for each, judged by the test set.
        baseline: the arm that the others' differences are to; None for no differences.
        settings: of all runs, by the names of the command's options, with underscores.
        cells: by name, what each sets: data, model, epsilon, epochs and so on.
        arms: by name, what each sets: ``arm``, the command's name of it, where the own name is
            another one; a learning rate and so on; a table ``options`` of `BackpropClipping`.
        tuning: how settings are chosen; None if the file has them all.

    Raises:
        ValidationError: something is wrong; the text names the place.
    """

    title: str = "study"
    seeds: Several[Seed] = (0, 1, 2, 3, 4)
    baseline: str | None = None
    settings: Table = Field(default_factory=dict)
    cells: dict[str, Table] = Field(default_factory=dict)
    arms: dict[str, Table] = Field(default_factory=dict)
    tuning: Tuning | None = None

    @property
    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each cell with each arm, by their names."""
        return itertools.product(self.cells, self.arms)

    def published(self, cell: str, arm: str, chosen: Table) -> list[RunSettings]:
        """Return the runs that are judged by the test set, with the settings that were chosen.

        Raises:
            ValidationError: a setting is wrong, as for all that follows.
        """
        return [self._run(cell, arm, chosen, seed) for seed in self.seeds]

    def trials(self, cell: str, arm: str) -> list[tuple[Table, list[RunSettings]]]:
        """Return what is tried, each with its runs, which are judged by held-out examples."""
        if self.tuning is None:
            return []
        part, seeds = self.tuning.held_out, self.tuning.seeds
        return [
            (point, [self._run(cell, arm, point, seed, held_out=part) for seed in seeds])
            for point in self.tuning.points(arm)
        ]

    def _run(
        self, cell: str, arm: str, chosen: Table, seed: int, *, held_out: float = 0.0
    ) -> RunSettings:
        merged = {"arm": arm, **self.settings, **self.cells[cell], **self.arms[arm], **chosen}
        name = merged.pop("arm")
        if options := {**self.arms[arm].get("options", {}), **chosen.get("options", {})}:
            merged["options"] = options
        return RunSettings(**merged, arms=(name,), seeds=(seed,), held_out=held_out)

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        self._require_places()
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline: there is no arm {self.baseline}")
        if self.tuning:
            self._require_equal_tuning(self.tuning)
        return self

    def _require_places(self) -> None:
        own = {f"arms.{name}": table for name, table in self.arms.items()}
        if self.tuning:
            own |= {f"tuning.grid.{name}": table for name, table in self.tuning.grid.items()}
        shared = {f"cells.{name}": table for name, table in self.cells.items()}
        for place, table in {"settings": self.settings, **shared, **own}.items():
            if found := set(OF_STUDIES.intersection(table)):
                raise ValueError(f"{place}.{min(found)}: the study sets it itself")
            if place in own and (found := set(OF_CELLS.intersection(table))):
                raise ValueError(
                    f"{place}.{min(found)}: all arms of a cell share it, so set it in the cell"
                )
            if place not in own and (found := {"arm", "options"}.intersection(table)):
                raise ValueError(f"{place}.{min(found)}: it is an arm's own, so set it in the arm")
            if not isinstance(table.get("options", {}), dict):
                raise ValueError(f"{place}.options {_NO_TABLE}")

    def _require_equal_tuning(self, tuning: Tuning) -> None:
        if unknown := set(tuning.grid).difference(self.arms):
            raise ValueError(f"tuning.grid.{min(unknown)}: there is no such arm")
        if both := set(tuning.seeds).intersection(self.seeds):
            raise ValueError(f"tuning.seeds: {min(both)} is published, and must not be tuned on")
        counts = {arm: len(tuning.points(arm)) for arm in self.arms}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{arm} {count}" for arm, count in counts.items())
            raise ValueError(f"tuning.grid: all arms must have as many trials, not {told}")


class StudyOptions(Options):
    """A study in place of one comparison.

    Args:
        study: a TOML file of cells, arms and seeds, in place of all that says what to measure;
            results are written beside it, and a study that was interrupted goes on
        processes: runs of a study at the same time
    """

    study: Path | None = None
    processes: Annotated[Count, HOW_TO_RUN] = 2


def _axes(table: Table) -> dict[tuple[str, ...], Any]:
    """Return the values to try by the path of their setting."""
    options = table.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"options {_NO_TABLE}")
    own = {(name,): values for name, values in table.items() if name != "options"}
    return own | {("options", name): values for name, values in options.items()}


def _point(axes: Iterable[tuple[str, ...]], values: Iterable[Any]) -> Table:
    point: Table = {}
    for (*tables, name), value in zip(axes, values, strict=True):
        (point.setdefault(tables[0], {}) if tables else point)[name] = value
    return point
