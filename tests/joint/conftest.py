"""What tests of the joint budget begin with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from opacus_bpclip.rules import RULES
from tests.joint import compiled


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(RULES, compiled.Scaled, compiled.ScaledRule)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # The compiler's own deprecations and hints are not what these tests are about.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()
