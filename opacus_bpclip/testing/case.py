"""One setting in which a rule is tested, and the error if the rule breaks a promise there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from opacus_bpclip.rules import Rule

# The sensitivity of every layer under test.
LIMIT = 0.7

# The rounding error of a sum of contributions that cancel, relative to the sensitivity.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    """A setting; its text is a part of every error message."""

    rule: type[Rule]
    make_layer: Callable[[], nn.Module]
    bound: str
    allocation: str
    normalize: bool
    dtype: torch.dtype
    max_input_norm: float | None = 3.0
    frozen: str = ""

    def with_one_frozen(self) -> Iterator[Case]:
        """Yield the setting with one of the layer's parameters frozen, if it has several."""
        names = [name for name, p in self.make_layer().named_parameters() if p.requires_grad]
        for name in names if len(names) > 1 else ():

            def frozen(name: str = name) -> nn.Module:
                layer = self.make_layer()
                layer.get_parameter(name).requires_grad_(False)
                return layer

            yield replace(self, make_layer=frozen, frozen=f", {name} frozen")

    def __str__(self) -> str:
        return (
            f"{self.rule.__name__} with bound={self.bound!r}, allocation={self.allocation!r}, "
            f"normalize={self.normalize}, "
            f"max_input_norm={self.max_input_norm}, {self.dtype}{self.frozen}"
        )


def require(held: bool, case: Case, promise: str, detail: str) -> None:
    """Raise an AssertionError unless the rule has kept the promise."""
    if not held:
        raise AssertionError(f"{case} breaks its promise: {promise}: {detail}")
