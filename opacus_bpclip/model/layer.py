"""A module whose own parameters are trained, and whether it still is what was examined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import nn
from typing_extensions import Self

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.model.calls import CallArguments
from opacus_bpclip.rules import Rule

State = Mapping[str, object]

# What can be no other value tomorrow while it is the same object.
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
# Whose layers hold their options as plain attributes.
_LIBRARIES = ("torch", "opacus", "transformers")
# What every module keeps for itself, whatever it computes.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True)
class Layer:
    """A module whose own parameters are trained.

    Attributes:
        name: dotted path in the model, ``"(root)"`` for the model itself.
        module: the module.
        kind: its class when it was examined.
        code: the methods that the rule relies on, by name, as they were then.
        state: all that the rule was made from; ``None`` where it may be more than can be compared.
        rule: what bounds its gradient.
        named_parameters: its trainable parameters, by name.
        arguments: where a call of it has the inputs that its rule looks at.
        uses: how often it may be used in one forward pass.
        recurrence: the recurrent network that it is a part of.
    """

    name: str
    module: nn.Module
    kind: type[nn.Module]
    code: tuple[tuple[str, object], ...]
    state: State | None
    rule: Rule
    named_parameters: Mapping[str, nn.Parameter]
    arguments: CallArguments
    uses: int = 1
    recurrence: nn.Module | None = None

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        rule: Rule,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch_axis: int,
        uses: int = 1,
        recurrence: nn.Module | None = None,
    ) -> Self:
        """Take down what a module is.

        Args:
            name: as the attribute.
            module: as the attribute.
            rule: as the attribute.
            parameters: as ``named_parameters``.
            batch_axis: which axis of its inputs is the batch, in the model's layout.
            uses: as the attribute.
            recurrence: as the attribute.
        """
        kind = type(module)
        # The rules of this package read what `_state` holds of a library's layers; another rule may
        # read anything, and another class compute its attributes.
        own = str(type(rule).from_module.__module__).startswith("opacus_bpclip.")
        known = kind.__module__.partition(".")[0] in _LIBRARIES
        return cls(
            name=name,
            module=module,
            kind=kind,
            code=tuple((method, getattr(kind, method)) for method in rule.methods),
            state=_state(module) if own and known else None,
            rule=rule,
            named_parameters=parameters,
            arguments=CallArguments.of(module, rule, rule.batch_axis(batch_axis)),
            uses=uses,
            recurrence=recurrence,
        )

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the layer's trainable parameters."""
        return tuple(self.named_parameters.values())

    @property
    def is_patched(self) -> bool:
        """Return whether the module computes something else than when it was examined."""
        if type(self.module) is not self.kind:
            return True
        for method, code in self.code:
            if getattr(self.kind, method) is not code:
                return True
        if vars(self.module) == self.state and not _has_parts(self.module):
            return False
        if not vars(self.module).keys().isdisjoint(self.rule.methods):
            return True
        try:
            now = type(self.rule).from_module(self.module)
        except CoverageError:
            return True
        # A parameter may be frozen since: the rule then bounds more than there is.
        return replace(now, weight=self.rule.weight, bias=self.rule.bias) != self.rule

    def replaced_parameter(self) -> str | None:
        """Return the name of a parameter that the module no longer uses as it is, if any."""
        for name, parameter in self.named_parameters.items():
            if getattr(self.module, name, None) is not parameter:
                return name
        return None


def _state(module: nn.Module) -> State | None:
    """Return all that a rule may read of a module, to be compared with its ``vars`` later.

    Two equal states, of the same class, make the same rule. ``None`` if there may be more to it.
    """
    if _has_parts(module):
        return None
    # A list may change within; what every module keeps for itself makes no rule.
    state = {
        name: list(value) if type(value) is list else value for name, value in vars(module).items()
    }
    own = (value for name, value in state.items() if name not in _BOOKKEEPING)
    return state if all(_is_plain(value) for value in own) else None


def _has_parts(module: nn.Module) -> bool:
    return bool(module._modules or module._buffers)


def _is_plain(value: object) -> bool:
    if type(value) in (tuple, list):
        return all(type(item) in _PLAIN for item in cast("Sequence[object]", value))
    return type(value) in _PLAIN
