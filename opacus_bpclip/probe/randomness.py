"""Random numbers in trial runs: repeatable, or the same for every example."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Arguments that turn an operation's randomness off, with the value that does.
_SWITCHES = {"dropout_p": 0.0, "train": False, "training": False}

# Parts of the names of PyTorch's operations that multiply matrices or convolve.
_PRODUCTS = ("mm", "matmul", "mv", "linear", "conv", "attention", "rnn", "lstm", "gru", "bilinear")


# The tolerance in units of the coarsest precision of a run: above the rounding of batched kernels,
# and below real differences. ``benchmarks/probe_margin.py`` measures both.
_UNITS = 2.0**10

# The tolerance for half precision and TensorFloat-32; with a larger one little would be found.
_COARSEST = 2.0**-4


# The seeds of runs that check whether a model's order of rows depends on random numbers.
SEEDS = (0, 1)


@contextmanager
def repeatable(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Seed every global random number generator, and restore them all afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        random.seed(seed)
        np.random.seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class Steady(TorchDispatchMode):
    """Makes random numbers equal in all rows, so that an example's row does not affect its result.

    Dropout keeps everything. Any other operation draws one number for the whole tensor, which later
    runs repeat. A random permutation reverses the order, so that it does move rows.

    Attributes:
        random: whether any operation was random.
        eps: the coarsest relative precision of any floating-point result.
        single_products: whether matrix products or convolutions ran in less than double precision,
            in which a GPU may use TensorFloat-32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.random = False
        self.eps = 0.0
        self.single_products = False
        self._drawn: list[list[Tensor]] = []
        self._next = 0

    def __enter__(self) -> Steady:
        self._next = 0
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = True
            out = self._steady(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                eps = torch.finfo(tensor.dtype).eps
                self.eps = max(self.eps, eps)
                if eps > torch.finfo(torch.float64).eps and any(
                    part in func._schema.name for part in _PRODUCTS
                ):
                    self.single_products = True
        return out

    def _steady(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        if not _SWITCHES.keys().isdisjoint(names):
            passed = zip(names, args, strict=False)
            args = tuple(_SWITCHES.get(name, value) for name, value in passed)
            off = {name: _SWITCHES[name] for name in names[len(args) :] if name in _SWITCHES}
            return func(*args, **kwargs | off)
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name == "bernoulli":
            return out.fill_(1)
        if name == "randperm":
            return out.copy_(torch.arange(len(out) - 1, -1, -1))
        tensors = [out] if isinstance(out, Tensor) else list(out)
        if self._next == len(self._drawn):
            self._drawn.append([tensor.flatten()[:1].clone() for tensor in tensors])
        for tensor, drawn in zip(tensors, self._drawn[self._next], strict=True):
            if tensor.numel() and drawn.numel():
                tensor.copy_(drawn.expand(tensor.numel()).view(tensor.shape))
        self._next += 1
        return out


def tolerated(steady: Steady, device: torch.device) -> float:
    """Return the largest relative difference at which the numbers of two runs count as equal.

    Args:
        steady: the mode that the runs were in.
        device: the device that they ran on.
    """
    if device.type == "cuda" and steady.single_products:
        return _COARSEST  # TensorFloat-32 products
    return min(_UNITS * steady.eps, _COARSEST)
