"""The interface of a replacer, and the copies of parameters that it makes."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class Copies:
    """Copies of a model's objects: one copy of each, however often the model refers to it.

    Attributes:
        memo: the copies by the original's ``id``, the memo of ``copy.deepcopy``.
    """

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self._parts: dict[tuple[int, int | None], nn.Parameter] = {}

    def parameter(self, parameter: Tensor | None) -> nn.Parameter:
        """Return the copy of a parameter."""
        copied = copy.deepcopy(parameter, self.memo)
        assert isinstance(copied, nn.Parameter)
        return copied

    def rows(self, parameter: nn.Parameter | None, rows: slice) -> nn.Parameter:
        """Return a copy of some rows, trainable if the parameter is."""
        assert parameter is not None
        return self._part(parameter, rows.start, parameter.detach()[rows])

    def flat(self, parameter: Tensor | None) -> nn.Parameter:
        """Return a flattened copy, trainable if the parameter is."""
        assert isinstance(parameter, nn.Parameter)
        return self._part(parameter, None, parameter.detach().flatten())

    def _part(self, parameter: nn.Parameter, key: int | None, part: Tensor) -> nn.Parameter:
        made = self._parts.get((id(parameter), key))
        if made is None:
            made = nn.Parameter(part.clone(), requires_grad=parameter.requires_grad)
            self._parts[id(parameter), key] = made
        return made


class Replacer(ABC):
    """Replaces layers of one kind.

    Attributes:
        keeps_state: whether a replacement has the state dict of the module that it replaces.
    """

    keeps_state: ClassVar[bool] = False

    @abstractmethod
    def is_needed(self, module: nn.Module) -> bool:
        """Return whether a module is of this kind and must be replaced for private training."""

    @abstractmethod
    def obstacle(self, module: nn.Module) -> str | None:
        """Return why a module of this kind cannot be replaced, and what to do; ``None`` if it can.

        The text continues a sentence that begins with the module's name.
        """

    @abstractmethod
    def make(self, module: nn.Module, copies: Copies) -> nn.Module:
        """Return the replacement, with the parameters' values, flags, dtypes and devices.

        Args:
            module: the module to replace; it is not changed.
            copies: makes copies of everything that the replacement takes over.
        """

    @abstractmethod
    def difference(self, module: nn.Module, made: nn.Module) -> str | None:
        """Return how a replacement differs from what it must compute, ``None`` if it does not.

        The comparison draws the values of the parameters; their present values do not matter.
        """


def common_obstacle(module: nn.Module, kind: type[nn.Module], *parts: nn.Module) -> str | None:
    """Return why a module is not an ordinary one of its kind, and what to do; ``None`` if it is.

    Args:
        module: the module.
        kind: the class whose forward the replacement knows.
        *parts: the modules inside that are replaced with it.
    """
    if type(module).forward is not kind.forward or "forward" in vars(module):
        return f"overrides {kind.__name__}.forward, so it is not known what it computes"
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        return "is not initialised yet: run one batch through the model first"
    if any(hasattr(each, "parametrizations") for each in (module, *parts)):
        return "is parametrized (weight_norm, spectral_norm, pruning): remove that first"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(
        not _is_of_the_guard(hook)
        for each in (module, *parts)
        for name in hooks
        for hook in getattr(each, name).values()
    ):
        return (
            "has hooks, which a replacement would lose: remove them, and register them on the "
            "model that get_compatible_module returns"
        )
    return None


def _is_of_the_guard(hook: Any) -> bool:
    """Return whether a hook only checks a module while it trains privately."""
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).startswith("opacus_bpclip.guard.")
