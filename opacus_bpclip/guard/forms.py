"""The ways in which a model is called, and which of them have passed the checks in eager mode.

The guard cannot check the layers' calls inside a graph that ``torch.compile`` has traced. The same
call in eager mode can be checked: one forward and backward pass on any values shows how the model
uses its parameters. So the gradients of graphs are used only after every way of calling the model
that has graphs has passed all checks in eager mode, on a batch of the user's or in a rehearsal on
made-up examples (`opacus_bpclip.guard.rehearsal`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_bpclip.guard.watched import WatchedParameter
from opacus_bpclip.probe.batches import EXAMPLES, Batch

# In the place of an argument that a traced graph cannot pass on.
NOT_SHOWN = "(not shown by a traced graph)"

_AUTOCAST = ("cpu", "cuda")

_NUMBERS = (int, float)


class Form(NamedTuple):
    """One way of calling a model. A call has the same form in a graph and in eager mode.

    Attributes:
        training: whether the model is in training mode.
        autocast: the kinds of devices for which autocast is on, each with its dtype.
        arguments: the arguments' outline: tensors as dtype and number of axes, flags and strings
            as they are, inside their tuples, lists and dictionaries. The values of numbers and the
            content of other objects are left out.
    """

    training: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    arguments: object


def form_of(training: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Form:
    """Return the form of a call.

    Args:
        training: whether the model is in training mode.
        args: the positional arguments.
        kwargs: the keyword arguments.
    """
    on = (kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind))
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in on)
    return Form(training, autocast, (_kind_of(args), _kind_of(kwargs)))


def _kind_of(value: Any) -> object:
    if isinstance(value, Tensor):
        return "tensor", value.dtype, value.dim()
    if isinstance(value, (bool, str)) or value is None:
        return ("object",) if value == NOT_SHOWN else ("value", value)
    if type(value) is dict:
        return "dict", tuple((str(key), _kind_of(value[key])) for key in value)
    if type(value) is tuple:
        return "tuple", tuple(map(_kind_of, value))
    if type(value) is list:
        # Texts and numbers in a list are one for each example: data, and not part of the form.
        return "list", tuple(_kind_of(part) for part in value if not _is_item(part))
    return ("number",) if isinstance(value, _NUMBERS) else ("object",)


def _is_item(value: Any) -> bool:
    return isinstance(value, _NUMBERS) or (isinstance(value, str) and value != NOT_SHOWN)


def shown(value: Any) -> Any:
    """Return what a graph can pass on of an argument, in code simple enough to be traced."""
    if isinstance(value, (Tensor, bool, int, str)) or value is None:
        return value
    if isinstance(value, float):
        # Any constant: torch.compile would trace a new graph for each value.
        return 1.0
    if type(value) is tuple:
        return tuple([shown(part) for part in value])
    if type(value) is list:
        return [shown(part) for part in value]
    if type(value) is dict:
        return {str(key): shown(value[key]) for key in value}
    return NOT_SHOWN


class Unchecked(NamedTuple):
    """A way of calling the model that has not passed all checks in eager mode.

    Attributes:
        form: the form of the call.
        example: a made-up batch of this form; ``None`` where none could be made.
        collected: whether eager mode has collected gradients in this form, of some parameters.
    """

    form: Form
    example: Batch | None
    collected: bool


class Forms:
    """The forms in which one model was called.

    Attributes:
        at_hand: the form of the current eager forward pass.
    """

    def __init__(self) -> None:
        self.at_hand: Form | None = None
        self._traced: dict[Form, Batch | None] = {}  # forms with graphs, and a made-up batch each
        self._collected: set[Form] = set()  # forms with gradients collected in eager mode
        self._renewed: set[Form] = set()  # forms with a graph traced after that
        self._settled: set[Form] = set()  # forms that need no further rehearsal

    @property
    def have_graphs(self) -> bool:
        """Return whether the model has been called in any form that has graphs."""
        return bool(self._traced)

    def note_traced(self, form: Form, example: Batch | None) -> None:
        """Record that a form has graphs.

        Args:
            form: the form.
            example: a made-up batch of this form; ``None`` where none could be made.
        """
        self._traced[form] = example
        # A new graph may use the parameters differently.
        self._settled.discard(form)
        self._renewed.add(form)

    def note_eager(self, batch: Batch) -> None:
        """Record that graphs ran inside the current eager forward pass.

        Args:
            batch: the arguments of that pass.
        """
        if self.at_hand is None or self.at_hand in self._traced:
            return
        try:
            self._traced[self.at_hand] = batch.invent(EXAMPLES)
        except Exception:  # whatever the arguments are
            self._traced[self.at_hand] = None

    def confirm(self, form: Form, watched: WatchedParameter) -> None:
        """Record that a parameter's gradient has passed every check in eager mode."""
        self._collected.add(form)
        watched.confirmed.add(form)

    def settle(self, form: Form) -> None:
        """Record that a form needs no further rehearsal."""
        self._settled.add(form)
        self._renewed.discard(form)
        self._traced[form] = None

    def unchecked(self, arrived: Iterable[WatchedParameter]) -> Iterator[Unchecked]:
        """Yield the forms that must be rehearsed.

        Args:
            arrived: the parameters that have gradients from graphs.
        """
        arrived = tuple(arrived)
        for form, example in tuple(self._traced.items()):
            seen = form not in self._renewed and all(form in w.confirmed for w in arrived)
            if arrived and not seen and form not in self._settled:
                yield Unchecked(form, example, form in self._collected)
