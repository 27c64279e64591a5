"""The options of backpropagation clipping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from typing_extensions import Self

from opacus_bpclip.config.checks import Frozen, is_positive_number, require_choice
from opacus_bpclip.config.thresholds import AdaptiveThreshold, ThresholdSchedule
from opacus_bpclip.config.whitening import InputWhitening, PinkNoise

Bound = Literal["product", "weighted", "exact"]
Allocation = Literal["joint", "equal", "dimension"]
LayerNoise = Literal["equal", "dimension"]
Propagate = Literal["clipped", "unclipped"]


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
        threshold: the norm of an example's gradient from which on it is scaled down; ``None`` for
            the limit itself, ``max_grad_norm`` or ``Delta_l``. An `AdaptiveThreshold` follows a
            quantile of the norms, a `ThresholdSchedule` is fixed before training. Gradients are
            then multiplied so that the sensitivity stays ``max_grad_norm``, and ``Delta_l`` is
            proportional to the layer's threshold.
        layer_noise: how the noise is divided over layers that clip by themselves. ``"equal"``: each
            number has the same noise, ``noise_multiplier * max_grad_norm``. ``"dimension"``: a
            layer ``l`` with ``d_l`` parameters has noise ``s_l`` that minimises
            ``sum(d_l * s_l ** 2)`` at the same privacy. A mapping from names to public numbers
            ``c_l`` minimises ``sum(c_l * d_l * s_l ** 2)``, 1 for layers without one; a layer with
            a large ``c_l`` is one whose noise does more harm.
        propagate: which gradient a layer that clips by itself passes on to the layers below.
            ``"clipped"``, the paper's choice, costs less time. With ``"unclipped"`` each layer
            clips the gradient of the loss itself, whatever the layers above have clipped; with
            small thresholds the layers below learn more. In single precision it needs a criterion
            or a sum: ``make_private`` refuses it with a plain mean. With ``allocation="joint"`` no
            layer passes on a clipped gradient, nor do recurrent networks and functions on
            parameters, whatever the allocation is.
        whitening: an `InputWhitening` makes the small directions of layer inputs larger before
            gradients are clipped; it needs ``bound="exact"``. ``None`` leaves gradients as they
            are.
        uses: the number of uses of a layer in one forward pass, by dotted name, for layers that
            clip by themselves; 1 for layers that are not named. Each of ``K`` uses is clipped to
            ``Delta_l / K``, so that together they stay within ``Delta_l``. More uses than declared
            are refused; fewer waste sensitivity. With ``"auto"``, ``make_private`` counts the uses
            in a trial on made-up examples. ``allocation="joint"`` needs no counts: the gradients of
            all uses are measured together.
        probe: whether to run the model on made-up examples before training, to check that no
            example influences another, and on the first items of a loader with a ``collate_fn`` of
            its own, to check that none is padded for another. Such an influence breaks the
            guarantee: with ``probe=False`` it is your responsibility that there is none. The trial
            that finds the batch axis of layers and functions runs in any case.

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
    threshold: AdaptiveThreshold | ThresholdSchedule | None = None
    layer_noise: LayerNoise | Mapping[str, float] = "equal"
    propagate: Propagate = "clipped"
    whitening: InputWhitening | None = None
    uses: Literal["auto"] | Mapping[str, int] = "auto"
    probe: bool = True

    @classmethod
    def paper(cls) -> Self:
        """Return the published method: a budget for each layer, the product bound, clipped inputs.

        Source: arXiv 2202.05089, whose own figures were withdrawn (``docs/tutorials/2022.md``). The
        bound is proved in ``docs/guarantee.md``.
        """
        return cls(allocation="dimension", bound="product", max_input_norm=3.0)

    @classmethod
    def for_images(cls, shape: tuple[int, ...] | None = None) -> Self:
        """Return what is best in the studies for networks of images that are trained from scratch.

        Inputs of layers are clipped to norm 3 and whitened by pink noise, one factor for each
        example scales all gradients. The ratio of ``max_grad_norm`` and learning rate, the batch
        size and the averaging of weights matter as much: ``docs/study-results.md``.

        Args:
            shape: of an image, channels first; ``None`` for that of the data loader's first input.
        """
        return cls(max_input_norm=3.0, whitening=InputWhitening(PinkNoise(shape)))

    def __post_init__(self) -> None:
        require_choice("bound", self.bound, get_args(Bound))
        if not isinstance(self.normalize, bool):
            raise ValueError(f"Expected normalize={self.normalize!r} to be True or False.")
        if not is_positive_number(self.stability):
            raise ValueError(f"Expected stability={self.stability!r} to be a finite number > 0.")
        if self.max_input_norm is not None and not is_positive_number(self.max_input_norm):
            raise ValueError(
                f"Expected max_input_norm={self.max_input_norm!r} to be a finite number > 0, or "
                "None."
            )
        require_choice("propagate", self.propagate, get_args(Propagate))
        self._check_whitening()
        self._check_threshold_and_noise()
        if self.bound == "product" and self.max_input_norm is None:
            raise ValueError(
                'bound="product" needs max_input_norm: the bound is max_input_norm times a norm of '
                'the upstream gradient. Set max_input_norm, or choose bound="weighted" or "exact".'
            )
        self._freeze_numbers("allocation", get_args(Allocation))
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
        object.__setattr__(self, "uses", Frozen(self.uses))

    def _check_whitening(self) -> None:
        if self.whitening is None:
            return
        if not isinstance(self.whitening, InputWhitening):
            raise ValueError(
                f"Expected whitening={self.whitening!r} to be an InputWhitening or None."
            )
        if self.bound != "exact":
            raise ValueError(
                f"whitening needs the norms of the whitened gradients, and bound={self.bound!r} "
                'would be far above them. Set bound="exact".'
            )

    def _check_threshold_and_noise(self) -> None:
        if self.threshold is not None:
            if not isinstance(self.threshold, (AdaptiveThreshold, ThresholdSchedule)):
                raise ValueError(
                    f"Expected threshold={self.threshold!r} to be an AdaptiveThreshold, a "
                    "ThresholdSchedule or None."
                )
            if self.normalize:
                raise ValueError(
                    "normalize=True scales every gradient to the limit, so that a threshold would "
                    "change nothing. Set one of the two."
                )
        self._freeze_numbers("layer_noise", get_args(LayerNoise))
        if self.layer_noise != "equal" and self.allocation == "joint":
            raise ValueError(
                f"layer_noise={self.layer_noise!r} needs layers that clip by themselves: with "
                'allocation="joint" any layer may get all of max_grad_norm. Set '
                'allocation="equal", or layer_noise="equal".'
            )

    def _freeze_numbers(self, option: str, choices: tuple[str, ...]) -> None:
        """Check an option that is a choice, or maps names to positive numbers; freeze a mapping."""
        value = getattr(self, option)
        if not isinstance(value, Mapping):
            require_choice(option, value, choices, "or a mapping")
            return
        for name, number in value.items():
            if not isinstance(name, str) or not is_positive_number(number):
                raise ValueError(
                    f"Expected {option}[{name!r}]={number!r} to map a module's name to a finite "
                    "number > 0."
                )
        object.__setattr__(self, option, Frozen(value))
