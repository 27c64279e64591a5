"""Scattering features of images, for small models: nothing in them is learnt from data.

Two layers of fixed wavelets, each followed by the modulus, and a local mean (Bruna and Mallat,
TPAMI 2013). Tramèr and Boneh (ICLR 2021, arXiv 2011.11660) showed how far private linear models
come with them. They are made of each image by itself, so they cost no privacy.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from opacus_bpclip.ab import data
from opacus_bpclip.ab.data import Sets
from opacus_bpclip.ab.features import featured

ANGLES = 8
# Of the mean's window, in pixels: each feature map has one value for 4 by 4 of them.
STRIDE = 4
CHANNELS = 1 + 2 * ANGLES + ANGLES**2
# The customary Morlet wavelets: of the finer ones the spread in pixels and the frequency; then the
# spread along the wave, by that across.
_SPREAD, _FREQUENCY, _SLANT = 0.8, 3 * math.pi / 4, 0.5
_OPPONENT_NORMS = (math.sqrt(3), math.sqrt(2), math.sqrt(6))
# Feature maps that are normalised together.
_GROUP = 3
# A whole image of complex numbers for each pair of angles would not fit into memory for all.
_AT_A_TIME = 64


def scattering(images: Tensor) -> Tensor:
    """Return each image's normalised scattering coefficients.

    Of each channel of an image there are 81 maps: its local mean; the local means of the moduli of
    its wavelet transforms, at two scales and 8 angles; and those of the moduli of the wavelet
    transforms, at the coarser scale and 8 angles, of each modulus at the finer one. Three maps at a
    time get mean 0 and variance 1, as by a group normalisation without parameters.

    Args:
        images: ``[N, C, H, W]``; ``H`` and ``W`` are multiples of 4.

    Returns:
        ``[N, C * 81 * (H // 4) * (W // 4)]``.
    """
    return torch.cat([_of_some(part) for part in images.split(_AT_A_TIME)])


def mirrored(images: Tensor) -> Tensor:
    """Return the means of the features of an image and of its mirror image.

    A linear model scores both alike, then. What tells them apart, about half of the features'
    variance, is averaged out, and the noise there matters less.

    Args:
        images: as for `scattering`.

    Returns:
        In the shape of those of `scattering`.
    """
    parts = images.split(_AT_A_TIME)
    return torch.cat([(_of_some(part) + _of_some(part.flip(-1))) / 2 for part in parts])


def in_opponent_colours(images: Tensor) -> Tensor:
    """Return images as their brightness, red against blue, and both against green.

    The axes are orthonormal. Red, green and blue are nearly the same picture three times. The maps
    of each axis are normalised apart from those of the others, so that differences of colours count
    as much as brightness.

    Args:
        images: ``[N, 3, H, W]``: red, green and blue.

    Returns:
        ``[N, 3, H, W]``.
    """
    red, green, blue = images.unbind(1)
    axes = (red + green + blue, red - blue, red - 2 * green + blue)
    return torch.stack([own / norm for own, norm in zip(axes, _OPPONENT_NORMS, strict=True)], dim=1)


def mirrored_in_opponent_colours(images: Tensor) -> Tensor:
    """Return the `mirrored` features of images `in_opponent_colours`."""
    return mirrored(in_opponent_colours(images))


@cache
def mnist(root: Path) -> Sets:
    """Return the features of MNIST, ``[N, 3969]``; all else as for `data.mnist`."""
    return featured(data.mnist(root), scattering)


@cache
def fashion_mnist(root: Path) -> Sets:
    """Return the features of Fashion-MNIST, ``[N, 3969]``."""
    return featured(data.fashion_mnist(root), scattering)


@cache
def cifar10(root: Path) -> Sets:
    """Return the features of CIFAR-10, ``[N, 15552]``."""
    return featured(data.cifar10(root), scattering)


@cache
def mirrored_cifar10(root: Path) -> Sets:
    """Return the `mirrored` features of CIFAR-10, `in_opponent_colours`, ``[N, 15552]``."""
    return featured(data.cifar10(root), mirrored_in_opponent_colours)


def _of_some(images: Tensor) -> Tensor:
    padded = F.pad(images, (STRIDE,) * 4, mode="reflect")
    fine, coarse = (_wavelets(padded.shape[-2:], scale) for scale in (1, 2))
    spectrum = torch.fft.fft2(padded).unsqueeze(2)
    first = _filtered(spectrum, fine, 1).abs()  # [N, C, ANGLES, H, W], padded
    first_coarse = _filtered(spectrum, coarse, 2).abs()
    second = _filtered(torch.fft.fft2(first).unsqueeze(3), coarse, 2).abs()
    orders = ((padded.unsqueeze(2), 1), (first, 1), (first_coarse, 2), (second.flatten(2, 3), 2))
    maps = torch.cat([_local_means(*own) for own in orders], dim=2).flatten(1, 2)
    return F.group_norm(maps, maps.shape[1] // _GROUP).flatten(1)


def _local_means(maps: Tensor, step: int) -> Tensor:
    """Return means under a Gaussian, one for 4 by 4 pixels, without those in the padding.

    Args:
        maps: ``[..., H, W]``, of every ``step``-th pixel.
        step: 1 or 2.
    """
    down, right = (_windows(size, step) for size in maps.shape[-2:])
    return down @ maps @ right.T


@cache
def _windows(size: int, step: int) -> Tensor:
    """Return the weights of the means, ``[means, size]``."""
    pixels = torch.arange(size) * step
    centres = torch.arange(STRIDE, size * step - STRIDE, STRIDE).unsqueeze(1)
    weights = (-((pixels - centres) / (2 * _SPREAD)).square() / 2).exp()
    return weights / weights.sum(dim=1, keepdim=True)


def _filtered(spectrum: Tensor, transfer: Tensor, step: int) -> Tensor:
    """Return every ``step``-th value of a filtered signal, of its spectrum ``[..., H, W]``."""
    product = spectrum * transfer
    height, width = product.shape[-2:]
    # To leave out values is to fold the spectrum.
    folded = product.unflatten(-1, (step, width // step)).mean(dim=-2)
    folded = folded.unflatten(-2, (step, height // step)).mean(dim=-3)
    return torch.fft.ifft2(folded)


@cache
def _wavelets(shape: torch.Size, scale: int) -> Tensor:
    """Return the spectra of Morlet wavelets, ``[ANGLES, H, W]``, real, and zero at frequency 0."""
    spread, frequency = _SPREAD * scale, _FREQUENCY / scale
    found = []
    for angle in (index * math.pi / ANGLES for index in range(ANGLES)):
        wave = (frequency * math.sin(angle), frequency * math.cos(angle))
        bell, around_zero = (_bell(shape, spread, at, angle) for at in (wave, (0.0, 0.0)))
        found.append(bell - bell[0, 0] / around_zero[0, 0] * around_zero)
    return torch.stack(found)


def _bell(shape: torch.Size, spread: float, centre: tuple[float, float], angle: float) -> Tensor:
    """Return the spectrum of a Gaussian window times a wave, ``[H, W]``, of sampled signals.

    Args:
        shape: in pixels.
        spread: of the window along the wave, in pixels.
        centre: the wave's frequency, down and across, in radians for a pixel.
        angle: of the wave.
    """
    # A sampled signal has the sum of all frequencies that look alike; those further out are tiny.
    alike = torch.arange(-1, 2)
    down, right = (
        2 * math.pi * (torch.fft.fftfreq(size).unsqueeze(1) + alike) - middle
        for size, middle in zip(shape, centre, strict=True)
    )
    down, right = down.view(shape[0], 1, -1, 1), right.view(1, shape[1], 1, -1)
    along = math.cos(angle) * right + math.sin(angle) * down
    across = (math.cos(angle) * down - math.sin(angle) * right) / _SLANT
    return (-(spread**2) / 2 * (along.square() + across.square())).exp().sum(dim=(2, 3))
