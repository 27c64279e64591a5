"""When a criterion is tried for coupled examples: at first, and again as training goes on."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from torch import nn

# Attributes that may switch what a criterion computes, and how many of their values are tried for
# each form of call: a counter has a new one in each.
_PLAIN = (bool, int, float, str)
_MOST_SETTINGS = 32


class Trials:
    """The calls of a criterion that were tried.

    Due are the first call of each form, the 2nd, the 4th, the 8th and so on, and the first one
    after a number or a name among the criterion's attributes has changed (the epoch, a switch).
    """

    def __init__(self) -> None:
        self._calls: Counter[object] = Counter()
        self._tried: defaultdict[object, set[object]] = defaultdict(set)

    def are_due(self, form: object, criterion: Any) -> bool:
        """Count a call, and return whether it is to be tried."""
        self._calls[form] += 1
        tried = self._tried[form]
        is_new = _settings(criterion) not in tried and len(tried) < _MOST_SETTINGS
        return is_new or self._calls[form].bit_count() == 1

    def note(self, form: object, criterion: Any) -> None:
        """Note that a call was tried, and is in order."""
        self._tried[form].add(_settings(criterion))


def _settings(criterion: Any) -> tuple[object, ...]:
    """Return the numbers and names among a criterion's attributes, and its parts'."""
    parts = criterion.modules() if isinstance(criterion, nn.Module) else [criterion]
    held = (getattr(part, "__dict__", {}) for part in parts)
    return tuple(own for each in held for own in each.items() if isinstance(own[1], _PLAIN))
