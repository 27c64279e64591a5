"""Which dtypes are accepted, and what is computed in which: all of it in one place.

A model may compute in `torch.bfloat16`, by autocast or by its parameters: its outputs and what
flows back through it are then rounded to eight bits. What this package makes of them is not. Norms,
factors, the sums over a batch and the noise are in the `wide` dtype: float64 for float64, else
float32. A sum over a batch that is rounded to bfloat16 may move by more than one example's
contribution (301 becomes 300 or 302). Proof: ``docs/guarantee.md``, "Low precision".
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional as F

# Half precision (float16) is left out: it trains with a GradScaler only, whose scale depends on the
# data.
ACCEPTED = (torch.float32, torch.float64, torch.bfloat16)

# Of a product of two numbers of 8 and of 11 bits: bfloat16, TensorFloat-32. Twice what it needs.
_ERRORS = {"bf16": 2.0**-7, "tf32": 2.0**-9}

# How many units of the last place the sums and products of one bound may lose together.
_ULPS = 64


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of norms, factors and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_low(dtype: torch.dtype) -> bool:
    """Return whether numbers of this dtype have fewer bits than float32's.

    Example:
        >>> is_low(torch.bfloat16), is_low(torch.float32), is_low(torch.int64)
        (True, False, False)
    """
    return dtype.is_floating_point and dtype.itemsize < 4


@overload
def wide(x: Tensor) -> Tensor: ...
@overload
def wide(x: None) -> None: ...


def wide(x: Tensor | None) -> Tensor | None:
    """Return a tensor in the dtype of norms and sums; the tensor itself if it has that.

    Products of two numbers of bfloat16 are exact in float32. So what is made of widened tensors is
    as right as if the model had computed these very numbers in float32. Integers stay as they are.
    """
    if x is None or not is_low(x.dtype):
        return x
    return x.to(norm_dtype(x.dtype))


def is_autocast() -> bool:
    """Return whether autocast is on, on any kind of device."""
    return bool(torch._C._is_any_autocast_enabled())


def full_precision() -> AbstractContextManager[object]:
    """Run without autocast, which would compute norms and sums in low precision."""
    return _without_autocast() if is_autocast() else nullcontext()


def under_autocast() -> bool:
    """Return whether autocast is on for the code that has called, `full_precision` or not."""
    return is_autocast() or getattr(_caller, "has_autocast", False)


# Of each thread: autograd has its own.
_caller = threading.local()


@contextmanager
def _without_autocast() -> Iterator[None]:
    before = getattr(_caller, "has_autocast", False)
    _caller.has_autocast = True
    try:
        with torch._C._DisableAutocast():
            yield
    finally:
        _caller.has_autocast = before


def product_error(device: torch.device) -> float:
    """Return the relative error that a device's products of float32 numbers are allowed to have.

    Two factors are rounded, each by half a unit of its last place, where the user lets products run
    in less than float32: by ``torch.set_float32_matmul_precision``, by a ``fp32_precision`` of
    ``torch.backends``, or since TensorFloat-32 is cuDNN's default.
    """
    return max(_ERRORS.get(precision, 0.0) for precision in _precisions(device))


def _precisions(device: torch.device) -> tuple[str, ...]:
    """Return what a device may take for float32 in products of matrices, images, sequences."""
    backend = {"cpu": "mkldnn", "cuda": "cuda"}.get(device.type)
    if backend is None:
        # Of others nothing is known; the meta device computes nothing.
        return ("ieee" if device.type == "meta" else "bf16",)
    precision_of = torch._C._get_fp32_precision_getter
    return tuple([precision_of(backend, kind) for kind in ("matmul", "conv", "rnn")])


def products_are_rounded(device: torch.device, kinds: Iterable[str]) -> bool:
    """Return whether a device's products of float32 numbers are rounded; many ignore the option.

    Args:
        device: the device.
        kinds: of products, ``"matmul"`` and ``"conv"``.
    """
    if not product_error(device):
        return False
    return any(_rounds_products(device, kind, *_precisions(device)) for kind in kinds)


@lru_cache(maxsize=32)
def _rounds_products(device: torch.device, kind: str, *_: str) -> bool:
    # A number that TensorFloat-32 has no bit for, times one; large enough for a library's kernels.
    number = 1 + 2.0**-12
    with torch.no_grad():
        if kind == "matmul":
            made = torch.full((64, 64), number, device=device) @ torch.eye(64, device=device)
        else:
            kernel = torch.zeros(16, 16, 3, 3, device=device)
            kernel[range(16), range(16), 1, 1] = 1
            made = F.conv2d(torch.full((8, 16, 10, 10), number, device=device), kernel)
    return bool((made != number).any())


def rounding_margin(dtype: torch.dtype, device: torch.device) -> float:
    """Return the relative error that rounding may add to a gradient of this dtype.

    Covers the norm's own arithmetic, the rounding of the scaled gradient to ``dtype``, and that of
    the factors of products, where it is allowed.
    """
    margin = _ULPS * torch.finfo(norm_dtype(dtype)).eps
    if dtype not in (torch.float64, torch.float32):
        margin += torch.finfo(dtype).eps
    return margin if dtype == torch.float64 else margin + product_error(device)
