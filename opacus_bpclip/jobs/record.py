"""The results of a command: written whole, read with care, continued where nothing changed."""

from __future__ import annotations

import json
import platform
import re
from abc import abstractmethod
from collections.abc import Collection, Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from opacus_bpclip.jobs.environment import commit, hardware, versions
from opacus_bpclip.jobs.errors import UsageError, where_and_what
from opacus_bpclip.jobs.files import write_whole
from opacus_bpclip.jobs.settings import Options

UNKNOWN_COMMIT = "unknown (installed package)"


class MeasuredWith(BaseModel):
    """What something was measured with.

    Args:
        commit: of the package, or several of them; None if it was installed, and not run from a
            checkout.
        platform: the system, in words.
        hardware: the device, in words.
        versions: of what decides the results.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    commit: str | None = Field(default_factory=commit)
    platform: str = Field(default_factory=platform.platform)
    hardware: str
    versions: dict[str, str | None] = Field(default_factory=versions)


class Result(BaseModel):
    """One result; its key tells it from the others of a record."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """What was measured."""


S = TypeVar("S", bound=Options)
R = TypeVar("R", bound=Result)


class Record(MeasuredWith, Generic[S, R]):
    """What a command has found so far, and with what.

    Args:
        format: of the file.
        settings: of the measurements.
        results: in the order of their first measurement.
    """

    # The subcommand, and what may differ between a run and its continuation.
    command: ClassVar[str]
    free: ClassVar[frozenset[str]]

    format: Literal[3] = 3
    settings: S
    results: tuple[R, ...] = ()

    @classmethod
    def new(cls, settings: S, device: str = "cpu", **more: Any) -> Self:
        """Return a record without results of what runs here and now."""
        return cls(settings=settings, hardware=hardware(device), **more)

    @classmethod
    def read(cls, path: Path, subject: str | None = None) -> Self:
        """Return the record that a file holds.

        Args:
            path: of the file.
            subject: what the error starts with; the path without it.

        Raises:
            UsageError: the file cannot be read, or is not a results file of the command.
        """
        try:
            return cls._of_text(path.read_text())
        except (OSError, ValueError) as error:
            reason = str(error)
            if isinstance(error, ValidationError):
                reason = where_and_what(error)
            raise UsageError(
                f"{subject or path} is not a results file of opacus-bpclip {cls.command} ({reason})"
            ) from error

    def write(self, path: Path) -> None:
        """Write the record to a file, whole or not at all, each list of numbers on one line."""
        facts = {"complete": self.complete, "seeds": self.seeds, **self._as_json()}
        text = json.dumps(facts, indent=1, allow_nan=False)
        flat = re.sub(r"\[[-+.\de,\s]+\]", lambda found: " ".join(found[0].split()), text)
        write_whole(path, flat + "\n")

    @classmethod
    def _of_text(cls, text: str) -> Self:
        return cls.model_validate_json(text)

    @property
    @abstractmethod
    def wanted(self) -> Sequence[Hashable]:
        """The keys of the results that the settings ask for, in the report's order."""

    @property
    @abstractmethod
    def seeds(self) -> tuple[int, ...]:
        """The seeds of everything random."""

    @property
    def complete(self) -> bool:
        """Whether there is a result for everything that is wanted."""
        return len(self.asked) == len(self.wanted)

    @property
    def asked(self) -> list[R]:
        """The results that the settings ask for, in the report's order."""
        return [found for key in self.wanted if (found := self.result(key)) is not None]

    def result(self, key: Hashable) -> R | None:
        """Return the result with a key, or None."""
        return next((found for found in self.results if found.key == key), None)

    def with_result(self, new: R) -> Self:
        """Return a record with one more result, in place of an older one with the same key."""
        by_key = {**{found.key: found for found in self.results}, new.key: new}
        return self.model_copy(
            update={"results": tuple(by_key.values()), "commit": self._commits()}
        )

    def continued(self, held: Self, refusal: str, *, free: Collection[str] = ()) -> Self:
        """Return this record with the results of another one.

        Args:
            held: the other record.
            refusal: what the error starts with.
            free: what may differ besides the class's ``free``.

        Raises:
            UsageError: they were measured with other settings, other versions or elsewhere; the
                text names all differences.
        """
        differences = self.differences(held, free)
        if differences and held.results:
            raise UsageError(f"{refusal}: {'; '.join(differences)}")
        held_commit = held.commit if held.results else self.commit
        return self.model_copy(update={"results": held.results, "commit": held_commit})

    def differences(self, held: Self, free: Collection[str]) -> list[str]:
        """Return in words what keeps another record's results out, as for `continued`."""
        there, now = held._decisive(), self._decisive()
        return [
            f"{name} {there.get(name)} there, {now.get(name)} now"
            for name in {**there, **now}
            if there.get(name) != now.get(name) and name not in free
        ]

    def _commits(self) -> str | None:
        """Return the record's commits and this run's, each once."""
        now = commit()
        if not self.results or self.commit == now:
            return now
        known = (self.commit or UNKNOWN_COMMIT).split(", ")
        return ", ".join(dict.fromkeys([*known, now or UNKNOWN_COMMIT]))

    def _decisive(self) -> dict[str, Any]:
        facts = self._as_json()
        del facts["results"]
        every = {**facts.pop("settings"), **facts.pop("versions"), **facts}
        return {name: value for name, value in every.items() if name not in self.free}

    def _as_json(self) -> dict[str, Any]:
        # Numbers that JSON does not know become texts on this way only.
        facts: dict[str, Any] = json.loads(self.model_dump_json())
        return facts
