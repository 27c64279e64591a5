"""What a mutant is, and the list of all."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from opacus_bpclip import hooks
from opacus_bpclip.clipping import attach
from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.model.layer import Layer
from tests.living import LIVING

Patch = Callable[[pytest.MonkeyPatch], None]
Killer = Callable[[], None]

# What `check_sensitivity` says: which layer, or all together, moved by how much.
MOVED = r": \d.* > "


@dataclass(frozen=True)
class Mutant:
    """One way to be wrong.

    Attributes:
        patch: puts it into the real code.
        killer: passes on the real code, and must fail on this; a check of `tests.checks` on an
            example that matters.
        says: what the killer's message must match, so that it dies of what it breaks.
    """

    patch: Patch
    killer: Killer
    says: str

    @property
    def name(self) -> str:
        return self.patch.__name__

    @property
    def wrong(self) -> str:
        """Return what is wrong with it, and why that matters."""
        return _sentence(self.patch)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Run with the mutant in the code."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            self.patch(monkeypatch)
            LIVING.append(self.patch)
            try:
                yield
            finally:
                LIVING.remove(self.patch)

    def died(self, error: AssertionError) -> bool:
        """Return whether the killer's error is about what the mutant breaks."""
        return re.search(self.says, str(error)) is not None


MUTANTS: list[Mutant] = []


def mutant(*, killed_by: Killer, says: str) -> Callable[[Patch], Patch]:
    """Enter a function that patches the code; its docstring says what is wrong, and why it matters.

    One function may be entered several times, with several killers. Mutants of the noise must be
    killed by the statistical audit, too.
    """

    def enter(patch: Patch) -> Patch:
        MUTANTS.append(Mutant(patch, killed_by, says))
        return patch

    return enter


def clipped_around_the_layer(patch: pytest.MonkeyPatch) -> None:
    """Have the layer's own autograd make its gradient, as for layers that have no closed form."""
    patch.setattr(attach, "CLOSED_FORMS", {})


def take_for_a_mean(patch: pytest.MonkeyPatch, mean: bool) -> None:
    """Have the layers take every gradient for a mean's, or none."""
    layer_clips = hooks.layer_clips

    def told(layers: Iterable[Layer], settings: Settings) -> Iterator[Clip]:
        return layer_clips(layers, settings._replace(mean=mean))

    patch.setattr(hooks, "layer_clips", told)


def example_of(killer: Killer) -> str:
    """Return on what a killer runs its check."""
    return _sentence(killer)


def _sentence(function: Callable[..., None]) -> str:
    text = inspect.getdoc(function)
    assert text is not None, f"{function.__name__} says nothing"
    return " ".join(text.split())
