"""The files that say what a run has spent: its ledger, and one in each checkpoint.

The ledger lies in a folder that each resume of the run finds, and holds what no checkpoint does:
the last steps of a run, and those of its branches. Each call of ``fit`` or ``train`` writes a file
of its own, so that two processes never overwrite each other's.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opacus_bpclip.integrations.spending import Spending

FILE = "privacy.json"
FOLDER = "privacy"

UNKNOWN_STEPS = (
    "so the steps that were taken before it are unknown and would be missing from epsilon. Resume "
    "from a checkpoint that a PrivateTrainer has saved. A model that was trained without privacy, "
    "or on other data, is a start for a new run: "
)

Location = str | os.PathLike[str]


class Ledger:
    """Keeps what a run has spent in files, and finds what its other branches have written.

    Args:
        spending: what was spent.
    """

    def __init__(self, spending: Spending) -> None:
        self.spending = spending
        self._folders: list[Path] = []

    def include(self, around: Location) -> None:
        """Write from now on into a `FOLDER` inside of this one, too.

        Not where a folder around it is written into: a resume looks there as well. Nor if it is
        in remote storage, which is not read.
        """
        if _is_local(around):
            folder = Path(around).resolve()
            if not {folder, *folder.parents} & set(self._folders):
                self._folders.append(folder)

    def cover(self, checkpoint: Location) -> None:
        """Write from now on where a resume from a checkpoint looks."""
        if _is_local(checkpoint):
            self.include(Path(checkpoint).parent)

    def restore(self, saved: Mapping[str, Any], checkpoint: Location) -> None:
        """Take over the steps of a checkpoint's run, those of its other branches included.

        They are looked for in all folders around the checkpoint, and where this ledger is written.
        It is written from now on where they were found, too, if that is allowed.

        Args:
            saved: the `Spending.state` that the checkpoint holds.
            checkpoint: where it lies.

        Raises:
            ValueError: another accountant counted the steps.
        """
        around = [*Path(checkpoint).resolve().parents] if _is_local(checkpoint) else []
        branches = []
        for folder in dict.fromkeys([*self._folders, *around]):
            found = [*_files_of(saved["run"], folder)]
            branches += [json.loads(path.read_text()) for path in found]
            if found and os.access(folder / FOLDER, os.W_OK):
                self.include(folder)
        self.spending.take_over(saved, branches)

    def write(self, *also: Path) -> None:
        """Write what was spent into the ledger, if anything was, and into further files."""
        state = self.spending.state()
        for path in also:
            write(path, state)
        if self.spending.steps:
            for folder in self._folders:
                write(folder / FOLDER / f"{self.spending.run}-{self.spending.segment}.json", state)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write what was spent into a file, whose folder is made if there is none.

    Whoever reads it, also after a crash, gets all of it or what was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(json.dumps(state, indent=2))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(checkpoint: Location) -> dict[str, Any]:
    """Return what was spent on the checkpoint in a folder.

    Raises:
        ValueError: it does not say so.
    """
    path = Path(checkpoint) / FILE
    if not path.exists():
        raise ValueError(
            f"The checkpoint {checkpoint} has no {FILE}, {UNKNOWN_STEPS}load it with "
            "from_pretrained, and train without resume_from_checkpoint."
        )
    saved: dict[str, Any] = json.loads(path.read_text())
    return saved


def _files_of(run: str, folder: Path) -> Iterator[Path]:
    return (folder / FOLDER).glob(f"{run}-*.json")


def _is_local(location: Location) -> bool:
    return "://" not in os.fspath(location)
