"""What tests of compiled models begin with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        # The compiler's own deprecations and hints are not what these tests are about.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()
