"""Scattering features of MNIST and Fashion-MNIST, whitened by what pink noise has for features.

Features of pictures lie in few directions, and those of public noise in about the same ones. Where
these are made more equal, the noise of a private step disturbs the small ones less. The mean and
the matrix are of noise alone, so the features cost no privacy. Run the command in this folder.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from kept import kept
from torch import Tensor

from opacus_bpclip import PinkNoise
from opacus_bpclip.ab import data
from opacus_bpclip.ab.data import Sets
from opacus_bpclip.ab.scattering import scattering

# Of the noise's covariance, in units of its mean eigenvalue: M = (A + DAMPING * I) ** -POWER.
POWER, DAMPING = 0.25, 0.01
# More pictures of noise than features, so that each direction has been seen.
PICTURES = 8192


def whitened(images: Tensor) -> Tensor:
    """Return each image's scattering features ``[N, 3969]``, centred and whitened."""
    mean, matrix = _learnt_from_noise()
    return (scattering(images) - mean) @ matrix


@cache
def mnist(root: Path) -> Sets:
    """Return the features of MNIST."""
    return kept("mnist-whitened-scattering", lambda: data.mnist(root), whitened)


@cache
def fashion_mnist(root: Path) -> Sets:
    """Return the features of Fashion-MNIST."""
    return kept("fashion-mnist-whitened-scattering", lambda: data.fashion_mnist(root), whitened)


@cache
def _learnt_from_noise() -> tuple[Tensor, Tensor]:
    """Return the mean and the matrix, which keeps the noise's mean square as it was."""
    noise = scattering(PinkNoise((1, 28, 28), count=PICTURES)(step=0)).double()
    mean = noise.mean(dim=0)
    eigenvalues, directions = torch.linalg.eigh((noise - mean).T @ (noise - mean) / PICTURES)
    relative = eigenvalues.clamp(min=0) / eigenvalues.mean()
    scales = (relative + DAMPING) ** -POWER
    scales /= (relative * scales.square()).mean().sqrt()
    return mean.float(), (directions * scales @ directions.T).float()
