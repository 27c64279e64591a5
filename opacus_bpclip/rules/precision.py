"""The accepted dtypes, and the dtype of each computation.

A model may compute in `torch.bfloat16`, by autocast or by the dtype of its parameters. Its outputs
and gradients are then rounded to eight bits. This package computes norms, factors, sums over a
batch and noise in the `wide` dtype: float64 for float64, otherwise float32. A sum over a batch that
is rounded to bfloat16 may change by more than one example's contribution (301 becomes 300 or 302).
Proof: ``docs/guarantee.md``, "Low precision".
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

# float16 is not accepted: it needs a GradScaler, whose scale depends on the data.
ACCEPTED = (torch.float32, torch.float64, torch.bfloat16)

# Relative error of a product of two factors of 8 bits (bfloat16) or 11 bits (TensorFloat-32), with
# a margin of two.
_ERRORS = {"bf16": 2.0**-7, "tf32": 2.0**-9}

# The rounding errors of all sums and products of one bound, in units in the last place.
_ULPS = 64


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of norms, factors and sums: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_low(dtype: torch.dtype) -> bool:
    """Return whether this is a floating-point dtype with fewer bits than float32.

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
    """Return a tensor in the dtype of norms and sums; the tensor itself if it has that dtype.

    A product of two bfloat16 numbers is exact in float32. So results from widened tensors are as
    accurate as if the model had computed these numbers in float32. Integers are left unchanged.
    """
    if x is None or not is_low(x.dtype):
        return x
    return x.to(norm_dtype(x.dtype))


def is_autocast() -> bool:
    """Return whether autocast is on, on any kind of device."""
    return bool(torch._C._is_any_autocast_enabled())


def full_precision() -> AbstractContextManager[object]:
    """Turn autocast off inside this context: it would compute norms and sums in low precision."""
    return _without_autocast() if is_autocast() else nullcontext()


def under_autocast() -> bool:
    """Return whether the user's code runs under autocast, also inside `full_precision`."""
    return is_autocast() or getattr(_caller, "has_autocast", False)


# One per thread: autograd runs backward functions in threads of its own.
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
    """Return the relative error that a device's products of float32 numbers may have.

    It is above 0 where PyTorch may round the factors to less than float32: by
    ``torch.set_float32_matmul_precision``, by a ``fp32_precision`` of ``torch.backends``, or by
    cuDNN's default, TensorFloat-32. Each factor is then rounded by half a unit in its last place.
    """
    return max(_ERRORS.get(precision, 0.0) for precision in _precisions(device))


def _precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions that a device may use for float32: matmul, convolution, RNN."""
    backend = {"cpu": "mkldnn", "cuda": "cuda"}.get(device.type)
    if backend is None:
        # Assume the lowest precision for unknown devices; the meta device computes nothing.
        return ("ieee" if device.type == "meta" else "bf16",)
    precision_of = torch._C._get_fp32_precision_getter
    return tuple([precision_of(backend, kind) for kind in ("matmul", "conv", "rnn")])


def products_are_rounded(device: torch.device, kinds: Iterable[str]) -> bool:
    """Return whether a device really rounds the factors of float32 products, by trying it.

    Many devices ignore the option that allows it.

    Args:
        device: the device.
        kinds: the kinds of products to try, of ``"matmul"`` and ``"conv"``.
    """
    if not product_error(device):
        return False
    return any(_rounds_products(device, kind, *_precisions(device)) for kind in kinds)


@lru_cache(maxsize=32)
def _rounds_products(device: torch.device, kind: str, *_: str) -> bool:
    # Multiply by one a number that TensorFloat-32 cannot represent. The tensors are large enough
    # for the kernels that would round it.
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

    It covers the arithmetic of the norm, the rounding of the scaled gradient to ``dtype``, and
    `product_error`.
    """
    margin = _ULPS * torch.finfo(norm_dtype(dtype)).eps
    if dtype not in (torch.float64, torch.float32):
        margin += torch.finfo(dtype).eps
    return margin if dtype == torch.float64 else margin + product_error(device)
