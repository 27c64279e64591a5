"""Check that the copies of a broadcast parameter are aligned with the examples.

The batch is the first axis of a copy, and broadcasting pairs axes from the last one on. If the
other tensor has more axes than the copy, the copy's batch axis is paired with an inner axis of that
tensor. If it has fewer, its batch axis is paired with an inner axis of the copy. Neither raises an
error where the sizes happen to agree, and both mix the gradients of different examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# These functions only read a tensor's dtype or device.
_NO_ARITHMETIC = (Tensor.to, Tensor.type_as)


class Alignment(TorchFunctionMode):
    """Checks the number of axes of every tensor that is combined with a copy.

    Args:
        copies: the copies, each ``[B, ...]``, by the parameter's name.
        data: the module's inputs.
        fail: raises an error with the given message.
    """

    def __init__(self, copies: dict[str, Tensor], data: Any, fail: Callable[[str], Any]) -> None:
        super().__init__()
        # By id. The tensors are kept alive, so that no new tensor gets the same id.
        self._copies = {id(copy): (name, copy) for name, copy in copies.items()}
        self._data = {id(x): x for x in tree_leaves(data) if isinstance(x, Tensor)}
        self._fail = fail

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        used = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        copies = [self._copies[id(x)] for x in used if id(x) in self._copies]
        others = [x for x in used if id(x) not in self._copies]
        if copies and func not in _NO_ARITHMETIC:
            for name, copy in copies:
                for other in others:
                    self._check(name, copy, other)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(self._is_data(x) for x in others):
            self._data |= {id(x): x for x in made}
        elif copies:
            self._copies |= {id(x): (copies[0][0], x) for x in made}
        return out

    def _is_data(self, x: Tensor) -> bool:
        # The inside of a custom autograd function is not seen, but its result requires a gradient.
        return id(x) in self._data or x.requires_grad

    def _check(self, name: str, copy: Tensor, other: Tensor) -> None:
        fewer = other.dim() < copy.dim() and self._is_data(other)
        if other.dim() > copy.dim() or fewer:
            self._fail(
                f"{name} is broadcast against a tensor of {other.dim()} axes, of shape "
                f"{tuple(other.shape)}, but its rule expects {copy.dim()} axes, the batch "
                "included. One example's copy of the parameter would be combined with other "
                "examples. Set the rule's dims to the number of axes of that tensor. A module that "
                "is used on tensors of different numbers of axes needs a class and a rule for each."
            )
