"""Compare a replacement with the original, on made-up parameters and inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# The accepted difference relative to the largest output, in float64.
TOLERANCE = 1e-9

# A call of a module: its description, and a function that makes the call.
Call = tuple[str, Callable[[nn.Module], Any]]


def twins(module: nn.Module, made: nn.Module, generator: torch.Generator) -> list[nn.Module]:
    """Return copies of both, in float64, with the same made-up parameters, in evaluation mode.

    The parameters' own values could hide a difference: many are zero before training.

    Args:
        module: the original.
        made: its replacement, whose state dict has the same keys.
        generator: draws the parameters.
    """
    pair = [copy.deepcopy(each).to_empty(device="cpu").double().eval() for each in (module, made)]
    state = {name: _made_up(name, value, generator) for name, value in pair[0].state_dict().items()}
    for each in pair:
        each.load_state_dict(state)
    return pair


def first_difference(pair: Iterable[nn.Module], calls: Iterable[Call]) -> str | None:
    """Return the first call on which a pair from `twins` differs, and how; ``None`` if none does.

    Args:
        pair: the original and the replacement.
        calls: the calls to try; the original must accept each of them.
    """
    one, other = pair
    for name, call in calls:
        with warnings.catch_warnings():
            # PyTorch warns that masks of two kinds are deprecated, but accepts them.
            warnings.simplefilter("ignore")
            expected = _tensors(call(one))
        try:
            found = _tensors(call(other))
        except Exception as error:  # any error is a difference: the original raised none
            return f"{name}: it raises {type(error).__name__}: {error}"
        shapes = [[tuple(x.shape) for x in outputs] for outputs in (expected, found)]
        if shapes[0] != shapes[1]:
            return f"{name}: its outputs have the shapes {shapes[1]}, not {shapes[0]}"
        for x, y in zip(expected, found, strict=True):
            largest, apart = float(x.abs().amax()), float((x - y).abs().amax())
            if not apart <= TOLERANCE * max(largest, 1.0):
                return f"{name}: its outputs differ by {apart:.2g} of {largest:.2g}"
    return None


def changed_state(module: nn.Module, made: nn.Module) -> str | None:
    """Return how a replacement's state dict differs from the module's; ``None`` if it does not."""
    before, after = module.state_dict(), made.state_dict()
    if before.keys() != after.keys():
        return f"its state_dict has {', '.join(after)} instead of {', '.join(before)}"
    for name, value in before.items():
        # Tensors without memory, on the meta device, have no values to compare.
        same = value.dtype == after[name].dtype and value.device == after[name].device
        equal = value.is_meta or torch.equal(value.nan_to_num(), after[name].nan_to_num())
        if not (same and equal):
            return f"{name} has another value, dtype or device"
    return None


def geometry(module: nn.Module) -> object:
    """Return a key of all options that decide what a module computes, without tensor values."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, type(None)))}
    shapes = [(name, tuple(value.shape)) for name, value in module.state_dict().items()]
    return type(module), sorted(plain.items(), key=str), shapes


def _made_up(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return torch.zeros(value.shape, dtype=value.dtype)
    made = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if name == "running_var":
        return made.abs() + 0.1
    # Scaled as layers are initialised: a saturated softmax or gate would hide differences.
    return made / value.shape[-1] ** 0.5 if value.dim() > 1 else made


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
