"""When a criterion is tried for coupled examples: at first, and again as training goes on."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_PLAIN = (bool, int, float, str)
# What each module holds for torch itself.
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
# Calls between two trials, at most: a random number, so that no period of the criterion's escapes.
_LONGEST = 128
# A setting that is new is tried at once: the first so many, and later ones that come some calls
# after a trial, a random number up to the second. A counter has a new setting in each call.
_MOST_SETTINGS = 32
_LONGEST_REST = 32


@dataclass
class _Form:
    """The calls of one form.

    Attributes:
        calls: how many there were.
        rested: the call from which on a new setting is tried at once, however many there were.
        next: the call that is due in any case.
        settings: those that were tried.
    """

    calls: int = 0
    rested: int = 0
    next: int = 1
    settings: set[object] = field(default_factory=set)


class Trials:
    """The calls of a criterion that were tried.

    Due are calls 1, 2, 4, 8 and so on of each form, up to 64, then one in 64 or so by chance, and
    the first one after a setting of the criterion has changed: a number or a name (the epoch, a
    switch) in an attribute, in an object or dictionary that it holds, or in a buffer of one number.

    Args:
        criterion: the criterion.
    """

    def __init__(self, criterion: Any) -> None:
        parts = criterion.modules() if isinstance(criterion, nn.Module) else [criterion]
        # What torch's own modules do inside of another one does not change from call to call.
        self._parts = [
            _Part(part)
            for part in parts
            if part is criterion or not type(part).__module__.startswith("torch.")
        ]
        self._forms: defaultdict[object, _Form] = defaultdict(_Form)
        self._random = random.Random(0)

    def are_due(self, form: object) -> bool:
        """Count a call, and return whether it is to be tried."""
        of = self._forms[form]
        of.calls += 1
        if of.calls >= of.next:
            return True
        is_looked_at = len(of.settings) < _MOST_SETTINGS or of.calls >= of.rested
        return is_looked_at and self._settings() not in of.settings

    def note(self, form: object) -> None:
        """Note that a call was tried, and is in order."""
        of = self._forms[form]
        of.settings.add(self._settings())
        of.rested = of.calls + self._random.randint(1, _LONGEST_REST)
        if of.calls >= of.next:
            later = self._random.randint(1, _LONGEST)
            of.next = of.calls + (of.calls if 2 * of.calls < _LONGEST else later)

    def _settings(self) -> tuple[object, ...]:
        return tuple(own for part in self._parts for own in part.settings())


class _Part:
    """A criterion, or a module in it, of which each call looks at the attributes."""

    def __init__(self, part: Any) -> None:
        self._part = part
        slots = (getattr(own, "__slots__", ()) for own in type(part).__mro__)
        self._slots = [name for own in slots for name in ((own,) if isinstance(own, str) else own)]
        self._names: list[str] = []
        self._size = 0  # of the attributes' dictionary when the names were listed

    def settings(self) -> Iterator[object]:
        """Yield the numbers and names in the attributes, and in what these hold."""
        held: dict[str, Any] = getattr(self._part, "__dict__", {})
        if self._size != len(held):
            self._size = len(held)
            self._names = [name for name in held if name not in _OF_MODULES]
        values = [(name, held.get(name)) for name in self._names]
        values += [(name, getattr(self._part, name, None)) for name in self._slots]
        for name, value in values:
            if isinstance(value, _PLAIN):
                yield name, value
            elif value is not None:
                yield from ((name, *own) for own in _held_by(value) if isinstance(own[1], _PLAIN))
        for name, buffer in held.get("_buffers", {}).items():
            # Elsewhere than on the CPU, reading it would wait for the device.
            if buffer is not None and buffer.numel() == 1 and buffer.device.type == "cpu":
                yield name, buffer.item()


def _held_by(value: Any) -> Iterable[tuple[object, object]]:
    """Return the items of a dictionary, or the attributes of an object that is no code."""
    if isinstance(value, dict):
        return value.items()
    if callable(value) or isinstance(value, Tensor):
        return ()
    return getattr(value, "__dict__", {}).items()
