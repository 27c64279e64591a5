"""A copy of a model in which every layer that cannot be trained privately is replaced."""

from __future__ import annotations

import copy

import torch
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.replacements.attention import MultiheadAttention
from opacus_bpclip.replacements.base import Copies
from opacus_bpclip.replacements.kinds import replacer_of
from opacus_bpclip.replacements.verify import changed_state, geometry


def compatible_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with what can be replaced replaced, and compared.

    What a module's several names, lists and other references refer to is one object in the copy,
    too, and shared parameters stay shared. What cannot be replaced is copied as it is. A fixer of
    one's own, registered with Opacus, is used as it is and not compared.

    Args:
        model: the model; neither it nor any random number generator is changed.

    Raises:
        CoverageError: a replacement would compute something else; the message names the module.
    """
    copies = Copies()
    replaced: list[tuple[str, nn.Module, nn.Module]] = []  # name, original, replacement
    _copy_computed_tensors(model, copies)
    # One's own fixers may draw parameters; the package's makers draw nothing.
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            made = _replacement(module, copies)
            if made is not None:
                copies.memo[id(module)] = made
                replaced.append((name or "(root)", module, made))
        copied = copy.deepcopy(model, copies.memo)
        _require_equal(replaced)
    _leave_fast_path(copied)
    return copied


def _replacement(module: nn.Module, copies: Copies) -> nn.Module | None:
    fixer = ModuleValidator.FIXERS.get(type(module))
    if fixer is not None and not fixer.__module__.startswith("opacus."):
        made = fixer(copy.deepcopy(module, copies.memo))
        assert isinstance(made, nn.Module)
        return made
    replacer = replacer_of(module)
    if replacer is None or replacer.obstacle(module):
        return None
    return replacer.make(module, copies)


def _require_equal(replaced: list[tuple[str, nn.Module, nn.Module]]) -> None:
    """Compare once what computes the same but for the values of its parameters."""
    known: list[object] = []
    for name, module, made in replaced:
        replacer = replacer_of(module)
        if replacer is None:
            continue
        problem = changed_state(module, made) if replacer.keeps_state else None
        options = geometry(module)
        if not problem and options not in known:
            problem = replacer.difference(module, made)
            known.append(options)
        if problem:
            raise CoverageError(
                f"{name} ({type(module).__name__}): its replacement, {type(made).__name__}, is not "
                f"the same, {problem}. Put a layer there that has a rule, and please report this "
                "as a bug."
            )


def _copy_computed_tensors(model: nn.Module, copies: Copies) -> None:
    """Enter copies of tensors that autograd made, which ``deepcopy`` refuses to copy."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                copies.memo[id(value)] = value.detach().clone()


def _leave_fast_path(model: nn.Module) -> None:
    """Have evaluation use the layers: PyTorch's encoder would hand them nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(part, MultiheadAttention) for part in module.modules()
        ):
            module.use_nested_tensor = False
