"""The ways in which a model is called: eager mode must vouch for those in which there are graphs.

The guard does not see what runs inside a traced graph. Whatever is wrong with the way in which a
model uses its parameters, eager mode finds in one forward and backward pass, on any values. So no
gradient that a graph has sent is used before each way of calling the model in which there are
graphs has passed every check in eager mode: on a batch of the user's, or in a rehearsal on made-up
examples (`opacus_bpclip.guard.rehearsal`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_bpclip.guard.watched import WatchedParameter
from opacus_bpclip.probe.batches import EXAMPLES, Batch

# Of an argument that a traced graph cannot hand over as it is.
NOT_SHOWN = "(not shown by a traced graph)"

_AUTOCAST = ("cpu", "cuda")

_NUMBERS = (int, float)


class Form(NamedTuple):
    """What tells ways of calling a model apart; the same in a graph and in eager mode.

    Attributes:
        training: whether the model is in training mode.
        autocast: the kinds of devices for which autocast is on, each with its dtype.
        arguments: dtypes and numbers of axes of tensors, flags and strings, in the tuples, lists
            and dictionaries that hold them; not what other objects hold, and no numbers.
    """

    training: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    arguments: object


def form_of(training: bool, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Form:
    """Return the form of a call.

    Args:
        training: whether the model is in training mode.
        args: by position.
        kwargs: by name.
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
        # One text, one number for each example: what they say, and how many, is the batch's.
        return "list", tuple(_kind_of(part) for part in value if not _is_item(part))
    return ("number",) if isinstance(value, _NUMBERS) else ("object",)


def _is_item(value: Any) -> bool:
    return isinstance(value, _NUMBERS) or (isinstance(value, str) and value != NOT_SHOWN)


def shown(value: Any) -> Any:
    """Return what a traced graph shows of an argument: as simple as a compiler can trace it."""
    if isinstance(value, (Tensor, bool, int, str)) or value is None:
        return value
    if isinstance(value, float):
        # Whatever it is: a graph for each value would be traced if it were handed over.
        return 1.0
    if type(value) is tuple:
        return tuple([shown(part) for part in value])
    if type(value) is list:
        return [shown(part) for part in value]
    if type(value) is dict:
        return {str(key): shown(value[key]) for key in value}
    return NOT_SHOWN


class Unvouched(NamedTuple):
    """A way of calling the model for which eager mode has not vouched.

    Attributes:
        form: its form.
        example: a made-up batch of it; ``None`` where none could be made.
        collected: whether it has brought gradients in eager mode, though not of all parameters.
    """

    form: Form
    example: Batch | None
    collected: bool


class Forms:
    """The ways in which one model was called.

    Attributes:
        at_hand: of the eager forward pass at hand.
    """

    def __init__(self) -> None:
        self.at_hand: Form | None = None
        self._traced: dict[Form, Batch | None] = {}  # those in which graphs run, with an example
        self._collected: set[Form] = set()  # those that brought gradients in eager mode
        self._renewed: set[Form] = set()  # those with a graph that was traced since
        self._settled: set[Form] = set()  # those that were rehearsed, as far as they could be

    @property
    def have_graphs(self) -> bool:
        """Return whether there are graphs of any way of calling the model."""
        return bool(self._traced)

    def note_traced(self, form: Form, example: Batch | None) -> None:
        """Note that there are graphs of a way of calling the model.

        Args:
            form: its form.
            example: a made-up batch of it; ``None`` where none could be made.
        """
        self._traced[form] = example
        # Another graph may use parameters in another way.
        self._settled.discard(form)
        self._renewed.add(form)

    def note_eager(self, batch: Batch) -> None:
        """Note that graphs ran inside the eager forward pass at hand.

        Args:
            batch: what it was called on.
        """
        if self.at_hand is None or self.at_hand in self._traced:
            return
        try:
            self._traced[self.at_hand] = batch.invent(EXAMPLES)
        except Exception:  # whatever the arguments are
            self._traced[self.at_hand] = None

    def confirm(self, form: Form, watched: WatchedParameter) -> None:
        """Note that a parameter's gradient has passed every check in eager mode."""
        self._collected.add(form)
        watched.confirmed.add(form)

    def settle(self, form: Form) -> None:
        """Note that nothing more is to be found out about a way of calling the model."""
        self._settled.add(form)
        self._renewed.discard(form)
        self._traced[form] = None

    def unvouched(self, arrived: Iterable[WatchedParameter]) -> Iterator[Unvouched]:
        """Yield the ways of calling the model that are to be rehearsed.

        Args:
            arrived: the parameters whose gradients graphs have sent.
        """
        arrived = tuple(arrived)
        for form, example in tuple(self._traced.items()):
            seen = form not in self._renewed and all(form in w.confirmed for w in arrived)
            if arrived and not seen and form not in self._settled:
                yield Unvouched(form, example, form in self._collected)
