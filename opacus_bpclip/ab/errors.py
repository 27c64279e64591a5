"""What ends a comparison early, and the exit status each cause has."""

from __future__ import annotations

from typing import ClassVar


class JobError(Exception):
    """A comparison that cannot go on; its text is one message for the user."""

    exit_status: ClassVar[int] = 1


class UsageError(JobError):
    """A setting, a file or a package that is wrong or missing; found before anything trains."""

    exit_status: ClassVar[int] = 2


class ArmError(JobError):
    """An arm that failed while it was training."""
