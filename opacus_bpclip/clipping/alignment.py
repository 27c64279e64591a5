"""While a module runs on one copy of its parameters for each example: does row i meet example i?

A copy has the batch on its first axis, and broadcasting pairs axes from the last one on. So the
copy's batch meets another axis of a tensor with more axes than the copy has, and the batch of a
tensor with fewer axes meets an inner axis of the copy. Both run without an error where the sizes
happen to agree, and both give an example's copy the gradient of other examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# They read a tensor's dtype or device.
_NO_ARITHMETIC = (Tensor.to, Tensor.type_as)


class Alignment(TorchFunctionMode):
    """Watches what the copies meet.

    Args:
        copies: each ``[B, ...]``, by the parameter's name.
        data: the module's inputs.
        fail: called with what is wrong; raises.
    """

    def __init__(self, copies: dict[str, Tensor], data: Any, fail: Callable[[str], Any]) -> None:
        super().__init__()
        # By identity; the tensors are kept, so that no other gets the same.
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
        # What a child's own autograd function returned was made out of sight, but has a graph.
        return id(x) in self._data or x.requires_grad

    def _check(self, name: str, copy: Tensor, other: Tensor) -> None:
        fewer = other.dim() < copy.dim() and self._is_data(other)
        if other.dim() > copy.dim() or fewer:
            self._fail(
                f"{name} is broadcast against a tensor of {other.dim()} axes, of shape "
                f"{tuple(other.shape)}, but its rule says {copy.dim()}, the batch included: one "
                "example's copy of it would meet other examples. Say in the rule's dims how many "
                "axes that tensor has. A module that is used on tensors of several numbers of axes "
                "needs a class and a rule for each."
            )
