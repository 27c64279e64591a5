"""Scattering features of MNIST and Fashion-MNIST, whitened by what pink noise has for features.

Features of pictures lie in few directions, and those of public noise in about the same ones. Where
these are made more equal, the noise of a private step disturbs the small ones less. The mean and
the matrix are of noise alone, so the features cost no privacy. Run the command in this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from kept import kept, kept_sets
from torch import Tensor

from opacus_bpclip import PinkNoise
from opacus_bpclip.ab import data
from opacus_bpclip.ab.data import Sets
from opacus_bpclip.ab.features import featured
from opacus_bpclip.ab.scattering import scattering

# Of the noise's covariance, in units of its mean eigenvalue: M = (A + DAMPING * I) ** -POWER.
POWER, DAMPING = 0.25, 0.01
# More pictures of noise than features, so that each direction has been seen.
PICTURES = 8192


def whitened(images: Tensor) -> Tensor:
    """Return each image's scattering features ``[N, 3969]``, centred and whitened."""
    mean, matrix = _learnt_from_noise()
    return (scattering(images) - mean) @ matrix


def noise(step: int = 0) -> Tensor:
    """Return the scattering features of pink noise, ``[8192, 3969]``, the same at each step."""
    (features,) = kept("noise-scattering", _of_noise, noise, scattering)
    return features


@cache
def mnist(root: Path) -> Sets:
    """Return the whitened features of MNIST."""
    return _kept("mnist", lambda: data.mnist(root))


@cache
def fashion_mnist(root: Path) -> Sets:
    """Return the whitened features of Fashion-MNIST."""
    return _kept("fashion-mnist", lambda: data.fashion_mnist(root))


@cache
def plain_mnist(root: Path) -> Sets:
    """Return the features of MNIST as they are, for `InputWhitening` with `noise` as its probes."""
    return _kept("mnist", lambda: data.mnist(root), scattering)


@cache
def plain_fashion_mnist(root: Path) -> Sets:
    """Return the features of Fashion-MNIST as they are."""
    return _kept("fashion-mnist", lambda: data.fashion_mnist(root), scattering)


def _kept(
    name: str, images: Callable[[], Sets], features: Callable[[Tensor], Tensor] = whitened
) -> Sets:
    name = f"{name}-{features.__name__}"
    return kept_sets(name, lambda: featured(images(), features), features, scattering)


def _of_noise() -> Iterator[Tensor]:
    yield scattering(PinkNoise((1, 28, 28), count=PICTURES)(step=0))


@cache
def _learnt_from_noise() -> tuple[Tensor, Tensor]:
    """Return the mean and the matrix, which keeps the noise's mean square as it was."""
    features = noise().double()
    mean = features.mean(dim=0)
    centred = features - mean
    eigenvalues, directions = torch.linalg.eigh(centred.T @ centred / PICTURES)
    relative = eigenvalues.clamp(min=0) / eigenvalues.mean()
    scales = (relative + DAMPING) ** -POWER
    scales /= (relative * scales.square()).mean().sqrt()
    return mean.float(), (directions * scales @ directions.T).float()
