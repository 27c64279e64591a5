"""The registry of rules, by class of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from opacus_bpclip.rules.base import Rule

Kind = type[nn.Module] | str
RuleClass = TypeVar("RuleClass", bound=type[Rule])

# The key is a dotted path where the class belongs to an optional package.
RULES: dict[Kind, type[Rule]] = {}


def registered_kind(kind: type[nn.Module]) -> tuple[type[nn.Module], type[Rule]] | None:
    """Return the first class in ``kind``'s ``__mro__`` that has a rule, and the rule."""
    for base in kind.__mro__:
        rule = RULES.get(base) or RULES.get(_path(base))
        if rule is not None:
            return base, rule
    return None


def register_rule(*kinds: Kind, replace: bool = False) -> Callable[[RuleClass], RuleClass]:
    """Register the decorated rule for layers of these classes.

    The privacy guarantee then depends on this rule, too. Its author must see to it that no bound is
    below the norm of an example's gradient, and that the results for one example do not depend on
    another.

    Args:
        *kinds: the layers' classes. The rule's ``parameters`` must name all of a layer's
            parameters, and the layer must return one tensor. A class of an optional package may be
            given as the dotted path of its definition,
            ``f"{kind.__module__}.{kind.__qualname__}"``.
        replace: whether to replace a rule that is registered already.

    Raises:
        TypeError: the decorated object is not a `Rule` class, or a kind is neither a module class
            nor a dotted path.
        ValueError: a kind has a rule already and ``replace`` is not set.

    Examples:
        >>> from opacus_bpclip.rules import LinearRule
        >>> class Doubled(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(2 * x)
        >>> @register_rule(Doubled, "package.layers.Doubled")
        ... class DoubledRule(LinearRule):
        ...     def measure(self, x):
        ...         return super().measure(2 * x)
        ...
        ...     def columns(self, x):
        ...         return super().columns(2 * x)
        >>> RULES.pop(Doubled) is RULES.pop("package.layers.Doubled") is DoubledRule
        True
    """

    def decorate(rule: RuleClass) -> RuleClass:
        if not (isinstance(rule, type) and issubclass(rule, Rule)):
            raise TypeError(f"Expected {rule!r} to be a subclass of Rule.")
        for kind in kinds:
            if not (_is_path(kind) or (isinstance(kind, type) and issubclass(kind, nn.Module))):
                raise TypeError(
                    f"Expected {kind!r} to be a subclass of nn.Module, or the dotted path of one."
                )
        for known in [known for known in RULES if any(_same(known, kind) for kind in kinds)]:
            if not replace:
                raise ValueError(
                    f"{_path(known)} has a rule already, {RULES[known].__name__}. Pass "
                    "replace=True to replace it."
                )
            del RULES[known]
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return decorate


def _path(kind: Kind) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _is_path(kind: object) -> bool:
    """Return whether a kind is written as ``package.module.Class``."""
    parts = kind.split(".") if isinstance(kind, str) else []
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _same(kind: Kind, other: Kind) -> bool:
    """Return whether two kinds mean the same class; different classes may have the same path."""
    by_path = isinstance(kind, str) or isinstance(other, str)
    return _path(kind) == _path(other) if by_path else kind is other
