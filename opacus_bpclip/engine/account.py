"""The steps that an accountant has counted, so that no checkpoint makes it forget any.

Privacy that was spent stays spent, also where an earlier state of the model is loaded. So steps
are added up over all that is known of, each once: see `opacus_bpclip.engine.segments`.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping
from typing import Any

from opacus.accountants import IAccountant

from opacus_bpclip.engine.segments import Segments, Steps, as_worst, count, history, total, union

KEY = "privacy_segments"


class Account:
    """The segments of the steps that an accountant has counted.

    Args:
        accountant: counts the steps.

    Attributes:
        segment: the identifier of the steps that are being taken.
    """

    def __init__(self, accountant: IAccountant) -> None:
        self.accountant = accountant
        self.segment = uuid.uuid4().hex
        self._earlier: Segments = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's steps are not the original's.
        vars(self).update(state)
        self.begin()

    def begin(self) -> None:
        """Begin a segment."""
        self._earlier, self.segment = self.segments(), uuid.uuid4().hex

    def segments(self) -> Segments:
        """Return all steps; those that are in no earlier segment are the present one's."""
        present = count(self.accountant.history) - total(self._earlier)
        return {**self._earlier, self.segment: present} if present else dict(self._earlier)

    def state(self) -> dict[str, list[Steps]]:
        """Return the segments as plain values."""
        return {name: history(steps) for name, steps in self.segments().items()}

    def adopt(self, segments: Segments) -> None:
        """Let the accountant count these steps and no others."""
        (segments,) = self._comparable(segments)
        self._set(segments)
        self.accountant.history = history(total(segments))

    def keep(self, before: Segments, saved: Mapping[str, list[Steps]]) -> None:
        """Put steps back that the accountant has forgotten by loading a checkpoint.

        Epsilon is then at least what it was before, and at least the checkpoint's. Steps of both
        count once if the checkpoint says which they are.

        Args:
            before: `segments` before it was loaded.
            saved: the `state` that was saved; what is not in it counts as other steps.
        """
        found = {"": count(self.accountant.history)}
        named = {name: count(steps) for name, steps in saved.items()}
        before, named, found = self._comparable(before, named, found)
        loaded = total(found)
        unnamed = loaded - total(named)
        if unnamed:
            named[uuid.uuid4().hex] = unnamed
        segments = union([before, named])
        forgotten = total(segments) - loaded
        if not forgotten and loaded == count(self.accountant.history):
            self._set(segments)
            return
        self.adopt(segments)
        if not forgotten:
            return
        warnings.warn(
            f"The checkpoint lacks {forgotten.total()} steps that this engine has counted. They "
            "were taken on the data, whatever becomes of the model, so they are added to the "
            f"checkpoint's {loaded.total()}. For other data, make a new PrivacyEngine, and load "
            "the checkpoint into that.",
            stacklevel=4,
        )

    def _set(self, segments: Segments) -> None:
        self._earlier = {name: steps for name, steps in segments.items() if name != self.segment}

    def _comparable(self, *reports: Segments) -> list[Segments]:
        """Return the same steps; all of one kind for an accountant that counts one kind only."""
        kinds = {kind for report in reports for steps in report.values() for kind in steps}
        if self.accountant.mechanism() != "gdp" or len(kinds) < 2:
            return list(reports)
        return [as_worst(report, kinds) for report in reports]
