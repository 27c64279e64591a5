"""Copy a model, and replace the layers that cannot be trained privately."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.replacements.attention import MultiheadAttention
from opacus_bpclip.replacements.base import Copies, Replacer
from opacus_bpclip.replacements.kinds import replacer_of
from opacus_bpclip.replacements.verify import changed_state, geometry


def compatible_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which replaceable modules are replaced and compared.

    Modules and parameters to which the model refers several times stay shared in the copy. Modules
    that cannot be replaced are copied unchanged. A fixer that the user has registered with Opacus
    is applied, but its result is not compared.

    Args:
        model: the model; neither it nor any random number generator is changed.

    Raises:
        CoverageError: a replacement computes something else than the module, or a lazy module is
            not initialised; the message names the module.
    """
    _require_initialised(model)
    copies = Copies()
    done: list[_Replaced] = []
    _copy_computed_tensors(model, copies)
    # The user's fixers may draw random numbers; this package's replacers draw none.
    with torch.random.fork_rng(devices=[]):
        # Inner modules first: a replacement takes over the copies of its parts.
        for name, module in reversed(list(model.named_modules())):
            fixer = _own_fixer(module)
            replacer = replacer_of(module)
            if fixer:
                copies.memo[id(module)] = fixer(copy.deepcopy(module, copies.memo))
            elif replacer and not replacer.obstacle(module):
                made = replacer.make(module, copies)
                copies.memo[id(module)] = made
                done.append(_Replaced(name or "(root)", module, made, replacer))
        copied = copy.deepcopy(model, copies.memo)
    _require_same(done[::-1])
    _leave_fast_path(copied)
    return copied


class _Replaced(NamedTuple):
    name: str
    module: nn.Module
    made: nn.Module
    replacer: Replacer


def _require_initialised(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = (*module._parameters.values(), *module._buffers.values())
        if any(nn.parameter.is_lazy(each) for each in own):
            raise CoverageError(
                f"{name or '(root)'} ({type(module).__name__}) is not initialised yet. Run one "
                "batch through the model first."
            )


def _own_fixer(module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """Return the fixer for modules of this class, if it was registered by the user."""
    fixer: Callable[[nn.Module], nn.Module] | None = ModuleValidator.FIXERS.get(type(module))
    return None if fixer is None or fixer.__module__.startswith("opacus.") else fixer


def _require_same(done: list[_Replaced]) -> None:
    """Compare replacements with the originals, once for each set of options.

    Raises:
        CoverageError: a replacement differs.
    """
    known: list[object] = []
    for name, module, made, replacer in done:
        problem = changed_state(module, made) if replacer.keeps_state else None
        options = geometry(module)
        if not problem and options not in known:
            problem = replacer.difference(module, made)
            known.append(options)
        if problem:
            raise CoverageError(
                f"{name} ({type(module).__name__}): its replacement, {type(made).__name__}, is not "
                f"valid: {problem}. Use a layer that has a rule instead, and please report this as "
                "a bug."
            )


def _copy_computed_tensors(model: nn.Module, copies: Copies) -> None:
    """Add copies of tensors with a graph to the memo: ``deepcopy`` refuses to copy them."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                copies.memo[id(value)] = value.detach().clone()


def _leave_fast_path(model: nn.Module) -> None:
    """Turn off the encoders' nested tensors in evaluation, which the layers do not accept."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(part, MultiheadAttention) for part in module.modules()
        ):
            module.use_nested_tensor = False
