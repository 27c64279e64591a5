"""The public options of backpropagation clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from typing_extensions import Self

Bound = Literal["product", "weighted", "exact"]
Allocation = Literal["joint", "equal", "dimension"]

Value = TypeVar("Value", int, float)


def is_positive_number(value: object) -> bool:
    """Return whether ``value`` is a real, finite number above zero (a bool is not a number)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return 0 < float(value) < math.inf
    except OverflowError:  # an integer beyond any float
        return False


class _Frozen(Mapping[str, Value]):
    """A mapping that cannot be changed, so that it can be hashed, copied and pickled."""

    def __init__(self, items: Mapping[str, Value]) -> None:
        self._items: tuple[tuple[str, Value], ...] = tuple(items.items())

    def __getitem__(self, name: str) -> Value:
        return dict(self._items)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return repr(dict(self._items))


@dataclass(frozen=True)
class BackpropClipping:
    """How layers clip their inputs and upstream gradients.

    Args:
        allocation: how ``max_grad_norm`` is spent. ``"joint"``: one factor for each example scales
            its gradients of all layers, as in flat DP-SGD. Otherwise each layer has a part of it,
            fixed beforehand, and clips by itself: ``"equal"``, ``"dimension"`` (proportional to the
            fourth root of the layer's number of parameters), or a mapping from each trainable
            layer's dotted name to its positive share of ``max_grad_norm ** 2`` (shares are
            normalised to sum to one).
        bound: the upper bound on an example's gradient norm that it is clipped by. ``"exact"``
            computes the norm itself; ``"weighted"`` is looser and cheaper, ``"product"`` is the
            paper's and the loosest.
        max_input_norm: every column that enters a layer's weight product (a vector, a token, a
            convolution's patch) is scaled down to at most this L2 norm, in training and in
            evaluation. ``None`` leaves inputs, and so the model, as they are;
            ``bound="product"`` needs a number.
        normalize: whether gradients are scaled up, too: an example's factor is the limit over its
            bound plus ``stability``, instead of at most 1.
        stability: added to the bound where gradients are normalised, in units of an example's
            gradient norm; a gradient far below it stays small. That keeps rounding errors of
            gradients that cancel from being scaled up to the limit.
        uses: for layers that clip by themselves, how often a layer is used in one forward pass, by
            dotted name; 1 where it is not named. Each of ``K`` uses is held to ``Delta_l / K``, so
            that together they stay within ``Delta_l``. More uses than declared are refused, fewer
            only waste sensitivity. ``"auto"`` lets ``make_private`` count them by running the model
            on made-up examples. With ``allocation="joint"`` nothing is counted: the uses' gradients
            are measured together.
        probe: whether the model is run on made-up examples to see that none influences another.
            What it would find breaks the guarantee; without it, that there is nothing to be found
            is your promise. How functions and layers take up the batch is looked at in any case.

    Raises:
        ValueError: an option outside these values; the message names it and what is accepted.

    Example:
        >>> BackpropClipping().allocation
        'joint'
        >>> BackpropClipping(bound="weighted", allocation="dimension", max_input_norm=3.0).bound
        'weighted'
    """

    allocation: Allocation | Mapping[str, float] = "joint"
    bound: Bound = "exact"
    max_input_norm: float | None = None
    normalize: bool = False
    stability: float = 0.01
    uses: Literal["auto"] | Mapping[str, int] = "auto"
    probe: bool = True

    @classmethod
    def paper(cls) -> Self:
        """Return the published method: a budget for each layer, the product bound, clipped inputs.

        Its bound is proved here, unlike the paper's (``docs/tutorials/2022.md``).
        """
        return cls(allocation="dimension", bound="product", max_input_norm=3.0)

    def __post_init__(self) -> None:
        _require_choice("bound", self.bound, get_args(Bound))
        if not isinstance(self.normalize, bool):
            raise ValueError(f"Expected normalize={self.normalize!r} to be True or False.")
        if not is_positive_number(self.stability):
            raise ValueError(f"Expected stability={self.stability!r} to be a finite number > 0.")
        if self.max_input_norm is not None and not is_positive_number(self.max_input_norm):
            raise ValueError(
                f"Expected max_input_norm={self.max_input_norm!r} to be a finite number > 0, or "
                "None."
            )
        if self.bound == "product" and self.max_input_norm is None:
            raise ValueError(
                'bound="product" needs a max_input_norm: its bound is max_input_norm times the '
                'upstream norm. Set max_input_norm, or choose bound="weighted" or "exact".'
            )
        if isinstance(self.allocation, Mapping):
            for name, share in self.allocation.items():
                if not isinstance(name, str) or not is_positive_number(share):
                    raise ValueError(
                        f"Expected allocation[{name!r}]={share!r} to map a module's name to a "
                        "finite number > 0."
                    )
            object.__setattr__(self, "allocation", _Frozen(self.allocation))
        else:
            _require_choice("allocation", self.allocation, get_args(Allocation), "or a mapping")
        if not isinstance(self.probe, bool):
            raise ValueError(f"Expected probe={self.probe!r} to be True or False.")
        if self.uses == "auto":
            return
        if not isinstance(self.uses, Mapping):
            raise ValueError(
                f"Expected uses={self.uses!r} to be a mapping of names to counts, or 'auto'."
            )
        for name, count in self.uses.items():
            if not isinstance(name, str) or type(count) is not int or count < 1:
                raise ValueError(
                    f"Expected uses[{name!r}]={count!r} to map a module's name to an integer >= 1."
                )
        object.__setattr__(self, "uses", _Frozen(self.uses))


def _require_choice(name: str, value: object, choices: tuple[str, ...], more: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected {name}={value!r} to be one of {expected} {more}".rstrip() + ".")
