"""What ends a command early, and the exit status each cause has."""

from __future__ import annotations

from typing import ClassVar


class JobError(Exception):
    """A command that cannot go on; its text is one message for the user."""

    exit_status: ClassVar[int] = 1


class UsageError(JobError):
    """A setting, a file or a package that is wrong or missing; found before any work."""

    exit_status: ClassVar[int] = 2


class ChildError(JobError):
    """Work that failed in a process of its own."""


class ArmError(JobError):
    """An arm that failed while it was training."""
