"""The mutants that are in the code at the moment, for checks that start processes of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

LIVING: list[Callable[[pytest.MonkeyPatch], None]] = []
