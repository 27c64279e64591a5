"""What a command is told, and where its results go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import BaseModel, ConfigDict
from typing_extensions import Self

from opacus_bpclip.jobs.values import HOW_TO_RUN, WHAT_TO_MEASURE, WHERE_TO_WRITE, OrNone


@Parameter(name="*")
@WHAT_TO_MEASURE
class Options(BaseModel):
    """A group of a command's options: each field is one, and its line of ``Args`` its help.

    Raises:
        ValidationError: a value is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replace(self, **changes: object) -> Self:
        """Return the same options with some changed, and checked again."""
        # Not dict(self), which holds what cached properties have found as well.
        own = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**own, **changes})


@WHERE_TO_WRITE
class Output(Options):
    """Where results go; nothing in it changes what is measured.

    Args:
        data: write all facts to this file, after every result
        resume: keep the results that the --json file holds already
        markdown: write the report to this file, as a page
        plot: draw a plot into this file (needs matplotlib)
        progress: say on stderr what is being done
    """

    data: Annotated[Path | None, Parameter(name="--json")] = None
    resume: Annotated[bool, HOW_TO_RUN] = False
    markdown: Path | None = None
    plot: OrNone[Path] = None
    progress: Annotated[bool, HOW_TO_RUN] = True
