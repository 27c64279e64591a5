"""The datasets, as tensors: images [N, C, H, W] in float32, labels [N] in int64.

Images are normalised by constants, never by statistics of the training set taken at run time,
which would be a release of private data that no accountant sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.extras import require

# A training set and a test set of (image, label).
Sets = tuple[TensorDataset, TensorDataset]


@dataclass(frozen=True)
class _Source:
    """A dataset that torchvision reads.

    ``mean`` and ``std`` are each channel's customary constants, for pixels in [0, 1].
    """

    torchvision_name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: str
    files: str


_IDX_FILES = "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte"


def mnist(root: Path) -> Sets:
    """Read MNIST, [N, 1, 28, 28]; torchvision downloads it into ``root`` if it is not there.

    Args:
        root: folder of the dataset's files.

    Raises:
        UsageError: a package is missing, or the files are neither there nor to be had.
    """
    return _both(_Source("MNIST", (0.1307,), (0.3081,), "MNIST/raw", _IDX_FILES), root)


def fashion_mnist(root: Path) -> Sets:
    """Read Fashion-MNIST; all else as for `mnist`."""
    source = _Source("FashionMNIST", (0.2860,), (0.3530,), "FashionMNIST/raw", _IDX_FILES)
    return _both(source, root)


def cifar10(root: Path) -> Sets:
    """Read CIFAR-10, [N, 3, 32, 32]; all else as for `mnist`."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    files = "data_batch_1 to data_batch_5, test_batch and batches.meta"
    return _both(_Source("CIFAR10", mean, std, "cifar-10-batches-py", files), root)


def digits() -> Sets:
    """Return scikit-learn's digits, [N, 1, 8, 8], split once and for all.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    require("sklearn", "the dataset digits")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, stratify=found.target, random_state=0
    )
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def _both(source: _Source, root: Path) -> Sets:
    return _read(source, root, train=True), _read(source, root, train=False)


def _read(source: _Source, root: Path, *, train: bool) -> TensorDataset:
    dataset = _open(source, root, train=train)
    pixels = torch.as_tensor(dataset.data)
    # MNIST is [N, H, W]; CIFAR-10 is [N, H, W, C].
    images = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    mean = torch.tensor(source.mean).view(-1, 1, 1)
    std = torch.tensor(source.std).view(-1, 1, 1)
    normalised: Tensor = images.contiguous().float().div_(255).sub_(mean).div_(std)
    return TensorDataset(normalised, torch.as_tensor(dataset.targets, dtype=torch.int64))


def _open(source: _Source, root: Path, *, train: bool) -> Any:
    require("torchvision", f"the dataset {source.torchvision_name}")
    import torchvision

    make = getattr(torchvision.datasets, source.torchvision_name)
    try:
        return make(root, train=train, download=False)
    except Exception:
        # Absent, incomplete or damaged: a download replaces what its checksum does not match.
        pass
    try:
        return make(root, train=train, download=True)
    except Exception as error:
        raise UsageError(_missing(source, root, error)) from error


def _missing(source: _Source, root: Path, error: Exception) -> str:
    name = source.torchvision_name
    reason = " ".join(str(error).split()) or type(error).__name__
    command = f"from torchvision.datasets import {name}; {name}({str(root)!r}, download=True)"
    return (
        f"{name} was looked for in {root / source.folder}, is not there or not readable, and "
        f"could not be downloaded ({reason}). Put {source.files} there, name the folder that holds "
        f"{source.folder} by --data-root, or, where there is a network, run: "
        f'python -c "{command}"'
    )
