"""Parameters of a module that has no rule of its own: the functions that it calls are followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules.base import Inputs, Prepared, Rule


@dataclass(frozen=True)
class FunctionRule(Rule):
    """Stands for no rule: each function's gradient is measured as it is.

    ``model/functions.py`` says how. Whatever the bound that is asked for, the exact one is taken.
    """

    methods: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[int] = 0

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Make the rule; nothing of the module enters it."""
        return cls(weight=False, bias=False)

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept whatever the module takes."""
        return 0, None

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Raise: a module is never called through this rule."""
        raise NotImplementedError

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Raise: a module is never called through this rule."""
        raise NotImplementedError
