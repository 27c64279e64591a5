"""The placeholder rule of modules whose parameters are bounded through the functions they call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules.base import Inputs, Prepared, Rule


@dataclass(frozen=True)
class FunctionRule(Rule):
    """A placeholder: each function's gradient is measured itself, see ``model/functions.py``.

    The bound is always the exact one, whatever the option ``bound``.
    """

    methods: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[int] = 0

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Make the rule; it does not depend on the module."""
        return cls(weight=False, bias=False)

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept any input."""
        return 0, None

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Raise: a module is never called through this rule."""
        raise NotImplementedError

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Raise: a module is never called through this rule."""
        raise NotImplementedError
