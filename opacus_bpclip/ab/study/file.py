"""A study's file, read and checked as a whole before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import ValidationError

from opacus_bpclip.ab.study.settings import Study
from opacus_bpclip.jobs.errors import UsageError, where_and_what

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_study(path: Path, data_root: Path | None = None) -> Study:
    """Return the study that a TOML file holds.

    Args:
        path: of the file.
        data_root: in place of the file's.

    Raises:
        UsageError: the file cannot be read, or asks for what there is not; the text names the
            place. Every run's settings are checked.
    """
    try:
        study = Study(**{"title": path.stem, **tomllib.loads(path.read_text())})
    except ValidationError as error:
        raise UsageError(f"{path}: {where_and_what(error)}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--study {path} cannot be read: {error}") from error
    if not (study.cells and study.arms):
        raise UsageError(f"{path} needs at least one [cells.NAME] and one [arms.NAME]")
    if data_root is not None:
        study = study.replace(settings={**study.settings, "data_root": data_root})
    for cell, arm in study.pairs:
        try:
            study.published(cell, arm, {})
            study.trials(cell, arm)
        except ValidationError as error:
            raise UsageError(f"{path}: cell {cell}, arm {arm}: {where_and_what(error)}") from None
    return study
