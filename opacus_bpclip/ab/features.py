"""Fixed features of the built-in images, for linear models: nothing in them is learnt from data.

Histograms of oriented gradients (Dalal and Triggs, CVPR 2005), of each image by itself. So they
cost no privacy, and are made once for a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from opacus_bpclip.ab import data
from opacus_bpclip.ab.data import Sets

CELL, BLOCK, ORIENTATIONS = 4, 2, 8
# Images at a time: the histograms of all pixels of all images would not fit into memory.
_AT_A_TIME = 1000
# Of an edge from black to white, so that the noise of an even block is not scaled up.
_STABILITY = 0.1


def hog(images: Tensor) -> Tensor:
    """Return each image's histogram of oriented gradients.

    Each pixel's gradient, of the channel where it is largest, votes with its length for the two
    nearest of 8 orientations in the cell of 4 by 4 pixels that it lies in. All blocks of 2 by 2
    cells are divided by their norm, and their squares are cut at 0.2.

    Args:
        images: ``[N, C, H, W]``.

    Returns:
        ``[N, 32 * (H // 4 - 1) * (W // 4 - 1)]``.
    """
    parts = [_of_some(part) for part in images.split(_AT_A_TIME)]
    return torch.cat(parts)


@cache
def mnist(root: Path) -> Sets:
    """Return the features of MNIST, ``[N, 1152]``; all else as for `data.mnist`."""
    return featured(data.mnist(root))


@cache
def fashion_mnist(root: Path) -> Sets:
    """Return the features of Fashion-MNIST, ``[N, 1152]``."""
    return featured(data.fashion_mnist(root))


@cache
def cifar10(root: Path) -> Sets:
    """Return the features of CIFAR-10, ``[N, 1568]``."""
    return featured(data.cifar10(root))


def featured(sets: Sets, features: Callable[[Tensor], Tensor] = hog) -> Sets:
    """Return the features of a training and a test set of images, with their labels."""
    made = [TensorDataset(features(own.tensors[0]), own.tensors[1]) for own in sets]
    return made[0], made[1]


def _of_some(images: Tensor) -> Tensor:
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    length, channel = (across.square() + down.square()).sqrt().max(dim=1, keepdim=True)
    across, down = across.gather(1, channel), down.gather(1, channel)
    # [N, 1, H, W], in [0, ORIENTATIONS): an edge has an orientation, but no direction.
    place = torch.atan2(down, across) / math.pi % 1 * ORIENTATIONS
    bins = torch.arange(ORIENTATIONS).view(-1, 1, 1)
    away = (place - bins).abs()
    votes = length * (1 - torch.minimum(away, ORIENTATIONS - away)).clamp(min=0)
    cells = F.avg_pool2d(votes, CELL)
    blocks = F.unfold(cells, BLOCK)  # [N, ORIENTATIONS * BLOCK ** 2, blocks]
    blocks = blocks / (blocks.norm(dim=1, keepdim=True) + _STABILITY)
    blocks = blocks.clamp(max=0.2)
    return (blocks / (blocks.norm(dim=1, keepdim=True) + _STABILITY)).flatten(1)
