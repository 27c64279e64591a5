"""What the commands' options have in common."""

from __future__ import annotations

import argparse
from typing import Any


class StoreTuple(argparse.Action):
    """Store the values as a tuple: settings are immutable."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the values."""
        setattr(namespace, self.dest, tuple(values))
