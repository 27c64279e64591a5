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
    """Return whether ``value`` is a finite number above zero; a bool does not count as one."""
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
    """The options of backpropagation clipping.

    Args:
        allocation: how ``max_grad_norm`` is spent. ``"joint"``: one factor for each example scales
            its gradients of all layers, as in flat DP-SGD. Otherwise each layer clips by itself,
            with its own part ``Delta_l`` of ``max_grad_norm``, fixed before training: ``"equal"``;
            ``"dimension"``, proportional to the fourth root of the layer's number of parameters;
            or a mapping from each trainable layer's dotted name to its positive share of
            ``max_grad_norm ** 2`` (the shares are normalised to sum to one).
        bound: the upper bound on the norm of an example's gradient. ``"exact"`` computes the norm
            itself. ``"weighted"`` is looser and cheaper. ``"product"`` is the paper's bound and the
            loosest.
        max_input_norm: the largest L2 norm of the columns that a layer's weight is multiplied with
            (a vector, a token, a convolution's patch). Larger ones are scaled down, in training and
            in evaluation. ``None`` leaves the inputs, and so the model, unchanged;
            ``bound="product"`` needs a number.
        normalize: whether small gradients are scaled up. An example's factor is then the limit
            divided by its bound plus ``stability``; otherwise it is at most 1.
        stability: the constant added to the bound if ``normalize`` is set, in units of the norm of
            an example's gradient. Gradients far below it stay small, so that rounding errors of
            gradients that cancel are not scaled up to the limit.
        uses: the number of uses of a layer in one forward pass, by dotted name, for layers that
            clip by themselves; 1 for layers that are not named. Each of ``K`` uses is clipped to
            ``Delta_l / K``, so that together they stay within ``Delta_l``. More uses than declared
            are refused; fewer waste sensitivity. With ``"auto"``, ``make_private`` counts the uses
            in a trial on made-up examples. ``allocation="joint"`` needs no counts: the gradients of
            all uses are measured together.
        probe: whether to run the model on made-up examples before training, to check that no
            example influences another. Such an influence breaks the guarantee: with
            ``probe=False`` it is your responsibility that there is none. The trial that finds the
            batch axis of layers and functions runs in any case.

    Raises:
        ValueError: an option has another value; the message names it and the accepted values.

    Examples:
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

        Source: arXiv 2202.05089, whose own figures were withdrawn (``docs/tutorials/2022.md``). The
        bound is proved in ``docs/guarantee.md``.
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
                'bound="product" needs max_input_norm: the bound is max_input_norm times a norm of '
                'the upstream gradient. Set max_input_norm, or choose bound="weighted" or "exact".'
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
