"""The device that the suite's core runs on: ``pytest --device cuda``, a processor by default.

Models and batches go there inside of the helpers that train. What they return, for tests to compare
and add up, is on the processor again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_device = torch.device("cpu")


def use(name: str) -> None:
    """Choose the device."""
    global _device
    _device = torch.device(name)
    if _device.type == "cuda":
        # No bound is attained, and no mean is taken, where products are rounded.
        torch.backends.fp32_precision = "ieee"


def device() -> torch.device:
    """Return the device."""
    return _device


def there(x: Tensor) -> Tensor:
    """Return a tensor on the device."""
    return x.to(_device)


def generator_there(generator: torch.Generator | None) -> torch.Generator | None:
    """Return a generator with the same seed on the device, or the very one."""
    if generator is None or generator.device.type == _device.type:
        return generator
    return torch.Generator(_device).manual_seed(generator.initial_seed())
