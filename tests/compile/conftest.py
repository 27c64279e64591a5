"""What tests of compiled models begin with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from opacus_bpclip.guard import rehearsal
from opacus_bpclip.guard.forms import Form


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        # The compiler's own deprecations and hints are not what these tests are about.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[Form]:
    """The forms that were rehearsed."""
    forms: list[Form] = []
    run = rehearsal._run

    def noted(model: nn.Module, guard: Any, form: Form, batch: Any) -> None:
        forms.append(form)
        run(model, guard, form, batch)

    monkeypatch.setattr(rehearsal, "_run", noted)
    return forms
