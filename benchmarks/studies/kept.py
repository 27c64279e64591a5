"""Features of a data set that are made once, and read from the temporary folder from then on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from opacus_bpclip.ab.data import Sets
from opacus_bpclip.ab.features import featured


def kept(name: str, images: Callable[[], Sets], features: Callable[[Tensor], Tensor]) -> Sets:
    """Return the features of a training and a test set, and keep them in a file of that name.

    Remove the file after a change of the features.
    """
    file = Path(tempfile.gettempdir()) / f"{name}.pt"
    if not file.exists():
        part = file.with_suffix(".part")
        torch.save([own.tensors for own in featured(images(), features)], part)
        part.replace(file)
    train, test = torch.load(file, mmap=True)
    return TensorDataset(*train), TensorDataset(*test)
