"""CIFAR-10 from JPEG copies of its images: ``train/CLASS/N.jpg`` and ``test/CLASS/N.jpg`` in a zip.

The copies are lossy, so figures are comparable among themselves, and not with those of the data
set's own files, which the command's ``cifar10`` reads. Run the command in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from kept import kept_sets
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from opacus_bpclip.ab import scattering as features
from opacus_bpclip.ab.data import Sets
from opacus_bpclip.ab.features import featured

FILE = "cifar10-jpeg.zip"
# The customary constants of each channel, for pixels in [0, 1].
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@cache
def images(root: Path) -> Sets:
    """Return a training and a test set of images ``[N, 3, 32, 32]`` and labels."""
    with ZipFile(root / FILE) as copies:
        return _part(copies, "train"), _part(copies, "test")


@cache
def hog(root: Path) -> Sets:
    """Return the same as features ``[N, 1568]``."""
    return featured(images(root))


@cache
def scattering(root: Path) -> Sets:
    """Return the same as features ``[N, 15552]``, kept in a file of 4 GB."""
    return _kept(root, features.scattering)


@cache
def mirrored_scattering(root: Path) -> Sets:
    """Return the same in opponent colours and with mirror images, ``[N, 15552]``."""
    return _kept(root, features.mirrored_in_opponent_colours)


def _kept(root: Path, of: Callable[[Tensor], Tensor]) -> Sets:
    return kept_sets(f"cifar10-jpeg-{of.__name__}", lambda: featured(images(root), of), of)


def _part(copies: ZipFile, part: str) -> TensorDataset:
    names = sorted(name for name in copies.namelist() if name.startswith(f"{part}/"))
    classes = sorted({name.split("/")[1] for name in names})
    pixels = np.empty((len(names), 32, 32, 3), dtype=np.uint8)
    for row, name in zip(pixels, names, strict=True):
        with copies.open(name) as file:
            row[:] = Image.open(file).convert("RGB")
    found = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    found.sub_(torch.tensor(MEAN).view(-1, 1, 1)).div_(torch.tensor(STD).view(-1, 1, 1))
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in names])
    return TensorDataset(found, labels)
