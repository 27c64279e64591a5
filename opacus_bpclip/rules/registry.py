"""The registry: which rule bounds which layer. A layer that is not here is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from opacus_bpclip.rules.base import Rule

Kind = type[nn.Module] | str
RuleClass = TypeVar("RuleClass", bound=type[Rule])

# By class; by dotted path where the class belongs to a package that need not be installed.
RULES: dict[Kind, type[Rule]] = {}


def registered_kind(kind: type[nn.Module]) -> tuple[type[nn.Module], type[Rule]] | None:
    """Return the nearest class in ``kind``'s ancestry that has a rule, and the rule."""
    for base in kind.__mro__:
        rule = RULES.get(base) or RULES.get(_path(base))
        if rule is not None:
            return base, rule
    return None


def register_rule(*kinds: Kind, replace: bool = False) -> Callable[[RuleClass], RuleClass]:
    """Register the decorated rule for layers of these classes.

    The guarantee then rests on the rule as well: no bound of it may be below the norm of an
    example's gradient, and nothing it does to one example may depend on another.

    Args:
        *kinds: the layers' classes. A layer's parameters must be named in the rule's
            ``parameters``, and it takes one tensor, batch first, and returns one. A class of a
            package that need not be installed may be named by the dotted path of its definition,
            ``f"{kind.__module__}.{kind.__qualname__}"``.
        replace: take the place of a rule that is registered already.

    Raises:
        TypeError: the decorated object is not a `Rule` class, or a kind is neither a module class
            nor a dotted path.
        ValueError: a kind has a rule already and ``replace`` is not set.

    Example:
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
                    f"Expected {kind!r} to be a class of modules, or the dotted path of one."
                )
        for known in [known for known in RULES if any(_are_one(known, kind) for kind in kinds)]:
            if not replace:
                raise ValueError(
                    f"{_path(known)} has a rule already, {RULES[known].__name__}. Pass "
                    "replace=True to take its place."
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


def _are_one(kind: Kind, other: Kind) -> bool:
    """Return whether two kinds stand for one class: two classes may have the same path."""
    by_path = isinstance(kind, str) or isinstance(other, str)
    return _path(kind) == _path(other) if by_path else kind is other
