"""Features that are made once, and read from the temporary folder from then on."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from opacus_bpclip.ab.data import Sets


def kept(
    name: str, make: Callable[[], Iterable[Tensor]], *functions: Callable[..., Any]
) -> tuple[Tensor, ...]:
    """Return what ``make`` returns, and keep it in a file.

    Args:
        name: of the file, which also holds a hash of code.
        make: returns tensors; called if there is no file.
        functions: the tensors are made anew when the source of a module that defines one changes.
    """
    code = "".join(inspect.getsource(inspect.getmodule(own)) for own in functions)
    digest = sha256(code.encode()).hexdigest()[:8]
    file = Path(tempfile.gettempdir()) / f"{name}-{digest}.pt"
    if not file.exists():
        part = file.with_suffix(".part")
        torch.save(tuple(make()), part)
        part.replace(file)
    return torch.load(file, mmap=True)


def kept_sets(name: str, make: Callable[[], Sets], *functions: Callable[..., Any]) -> Sets:
    """Do the same for a training and a test set, each of examples and labels."""
    made = kept(name, lambda: (tensor for own in make() for tensor in own.tensors), *functions)
    return TensorDataset(*made[:2]), TensorDataset(*made[2:])
