"""A trainable layer: a module with trainable parameters of its own, as it was examined."""

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
from opacus_bpclip.model.views import FoldViews
from opacus_bpclip.rules import Rule
from opacus_bpclip.rules.views import over_views

State = Mapping[str, object]

# Immutable types.
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
# Libraries whose layers hold their options as plain attributes.
_LIBRARIES = ("torch", "opacus", "transformers")
# Attributes that every module has, whatever it computes.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True)
class Layer:
    """A module with trainable parameters of its own.

    Attributes:
        name: dotted path in the model, ``"(root)"`` for the model itself.
        module: the module.
        kind: its class at the examination.
        code: the methods that the rule relies on, by name, at the examination.
        state: the module's attributes that the rule was made from; ``None`` if it may depend on
            more than these.
        rule: the rule that bounds its gradient.
        named_parameters: its trainable parameters, by name.
        arguments: the arguments of its calls that are the rule's inputs.
        uses: the number of uses allowed in one forward pass.
        recurrence: the recurrent network that it is a part of, if any.
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
        fold: FoldViews | None = None,
    ) -> Self:
        """Make a layer, and record what the module is at this time.

        Args:
            name: dotted path in the model, ``"(root)"`` for the model itself.
            module: the module.
            rule: the rule that bounds its gradient.
            parameters: its trainable parameters, by name.
            batch_axis: the batch axis of its inputs in the model's layout.
            uses: the number of uses allowed in one forward pass.
            recurrence: the recurrent network that it is a part of, if any.
            fold: the module that makes several rows of each example for it, if any. Where the rule
                has no form for these, the functions that the layer calls are followed instead.
        """
        folded = over_views(rule) if fold is not None and recurrence is None else None
        if folded is None:
            fold = None
        else:
            rule = folded
        kind = type(module)
        # For a library's layer, this package's rules read nothing but what `_state` holds. Rules of
        # the user's may read anything, and other classes may compute their attributes.
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
            arguments=CallArguments.of(module, rule, rule.batch_axis(batch_axis), fold),
            uses=uses,
            recurrence=recurrence,
        )

    @cached_property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the layer's trainable parameters."""
        return tuple(self.named_parameters.values())

    @property
    def is_patched(self) -> bool:
        """Return whether the module may compute something else than at the examination."""
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
        # A parameter may have been frozen since. The old rule is still an upper bound.
        return replace(now, weight=self.rule.weight, bias=self.rule.bias) != self.rule

    def replaced_parameter(self) -> str | None:
        """Return the name of a parameter that is no longer an attribute of the module, if any."""
        for name, parameter in self.named_parameters.items():
            if getattr(self.module, name, None) is not parameter:
                return name
        return None


def _state(module: nn.Module) -> State | None:
    """Return the attributes that a rule may read, to be compared with the module's ``vars`` later.

    Modules of the same class with equal states have the same rule. ``None`` if the rule may depend
    on more than these attributes.
    """
    if _has_parts(module):
        return None
    # Copy lists, which may be changed in place.
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
