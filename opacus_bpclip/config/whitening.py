"""Whitening of layer inputs: which directions of them are large is learnt from public examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from opacus_bpclip.config.checks import is_positive_number, require_positive


def public_seed(*numbers: int) -> int:
    """Return a seed below ``2 ** 32`` for public examples that nobody gives to the noise.

    Noise and public examples from one seed would be the same random numbers.
    """
    return int.from_bytes(sha256(f"public examples {numbers}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class PinkNoise:
    """Makes public pictures: noise with amplitudes of one over the frequency, as pictures have.

    Args:
        shape: of one picture: channels, then one or more axes of space. ``None`` stands for the
            shape of the data loader's first input, which `make_private` looks up. The guarantee
            holds only if this shape does not depend on the private data.
        count: how many are made at a time.
        mean: the mean of each channel.
        deviation: the standard deviation of each channel.
        seed: of the random numbers; each step draws its own.

    Raises:
        ValueError: a value is out of range; the message names it.

    Examples:
        >>> noise = PinkNoise((1, 8, 8), count=4)
        >>> noise(step=0).shape
        torch.Size([4, 1, 8, 8])
        >>> bool((noise(step=0) == noise(step=20)).all())
        False
    """

    shape: tuple[int, ...] | None = None
    count: int = 512
    mean: float = 0.0
    deviation: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape is not None:
            shape = tuple(self.shape) if isinstance(self.shape, (tuple, list)) else ()
            if len(shape) < 2 or any(type(size) is not int or size < 1 for size in shape):
                raise ValueError(
                    f"Expected shape={self.shape!r} to be the shape of one picture: channels, then "
                    "at least one axis of space."
                )
            object.__setattr__(self, "shape", shape)
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"Expected count={self.count!r} to be an integer >= 1.")
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise ValueError(f"Expected seed={self.seed!r} to be an integer >= 0, below 2 ** 31.")
        if not isinstance(self.mean, (int, float)) or not math.isfinite(self.mean):
            raise ValueError(f"Expected mean={self.mean!r} to be a finite number.")
        require_positive(self, ("deviation",))

    def __call__(self, step: int) -> Any:
        """Return the pictures of a step, ``[count, *shape]`` in float32.

        Raises:
            ValueError: the shape is not known.
        """
        import torch  # Here: options can be read without it.

        if self.shape is None:
            raise ValueError("PinkNoise needs the shape of one picture, such as (3, 32, 32)")
        space = self.shape[1:]
        generator = torch.Generator().manual_seed(public_seed(self.seed, step))
        white = torch.randn(self.count, *self.shape, generator=generator)
        axes = tuple(range(2, 2 + len(space)))
        grids = torch.meshgrid(
            *(torch.fft.fftfreq(size) for size in space[:-1]),
            torch.fft.rfftfreq(space[-1]),
            indexing="ij",
        )
        frequency = torch.stack(grids).norm(dim=0).clamp(min=1 / max(space))
        pink = torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) / frequency, s=space, dim=axes)
        pink = pink - pink.mean(dim=axes, keepdim=True)
        spread = pink.square().mean(dim=axes, keepdim=True).sqrt().clamp(min=1e-12)
        return pink / spread * self.deviation + self.mean


# With less, the powers of eigenvalues may be too large for float32.
_LEAST_DAMPING = 1e-12


@dataclass(frozen=True)
class InputWhitening:
    """Whitening of the inputs of linear layers and convolutions, before gradients are clipped.

    An example's gradient of a layer is ``sum_p g_p u_p^T``, of upstream gradients ``g_p`` and input
    columns ``u_p`` (a vector, a token, a convolution's patch). It becomes ``sum_p g_p (M u_p)^T``
    with ``M = (A / a + damping * I) ** -power``, where ``A`` is the mean of ``u u^T`` over public
    examples and ``a`` its mean eigenvalue. All eigenvalues of ``A`` but the ``rank`` largest are
    replaced by their mean, so that a product with ``M`` costs little. No eigenvalue of ``M`` is
    below a hundredth of the largest. The whitened gradient is what is measured, clipped and summed,
    gets the noise, and is the step. Directions in which inputs are small become larger, so that the
    noise disturbs them less. What the model computes, and the gradient of its inputs, do not
    change.

    The matrices are learnt in ``make_private`` and then every ``every`` steps, from the model's
    weights and the public examples alone. So they cost no privacy. In single precision they need a
    criterion or a sum: ``make_private`` refuses them with a plain mean.

    Args:
        probes: called with the number of steps since ``make_private``; returns public examples:
            what the model is called with in training, a tensor, a tuple of arguments, or a
            dict of keyword arguments. The guarantee holds only if they do not depend on the private
            data. `PinkNoise`, the default, makes some for models of pictures. Global random numbers
            get a seed of their own for each step, and are restored after the call.
        power: how far directions are made equal; above 0, and at most 1/2, which makes them equal.
        damping: what is added to the eigenvalues, in units of their mean; at least 1e-12.
        rank: the number of directions whose eigenvalues are told apart.
        every: the number of steps from one matrix to the next.
        max_size: layers whose columns have more entries are left as they are: their matrices would
            cost more than they gain. So are layers that share their weight with others, recurrent
            networks, and functions on parameters.

    Raises:
        ValueError: a value is out of range; the message names it.

    Examples:
        >>> InputWhitening().power
        0.25
        >>> InputWhitening(PinkNoise((3, 32, 32), count=100), every=50).rank
        16
    """

    probes: PinkNoise | Callable[[int], Any] = PinkNoise()
    power: float = 0.25
    damping: float = 1e-3
    rank: int = 16
    every: int = 20
    max_size: int = 1024

    def __post_init__(self) -> None:
        if not callable(self.probes):
            raise ValueError(
                f"Expected probes={self.probes!r} to be a function of the step's number that "
                "returns public examples, such as PinkNoise((1, 28, 28))."
            )
        if not is_positive_number(self.power) or self.power > 0.5:
            raise ValueError(f"Expected power={self.power!r} to be a number > 0 and at most 0.5.")
        if not is_positive_number(self.damping) or self.damping < _LEAST_DAMPING:
            raise ValueError(f"Expected damping={self.damping!r} to be a number >= 1e-12.")
        for name in ("rank", "every", "max_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"Expected {name}={value!r} to be an integer >= 1.")
