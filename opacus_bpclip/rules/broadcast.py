"""Parameters that a module broadcasts over the batch: a class token, a position embedding, a scale.

While the module's forward runs, each such parameter is replaced by one copy per example. The
gradient of a copy is the example's gradient of the parameter. Proof: ``docs/rules/broadcast.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.rules import norms
from opacus_bpclip.rules.base import Inputs, Prepared, Rule


@dataclass(frozen=True)
class BroadcastRule(Rule):
    """Base class; a subclass names the ``parameters`` of its module that are broadcast.

    The author of the subclass promises that the module's forward uses each of them as a tensor
    whose first axis is the batch, row ``i`` for example ``i`` alone. Broadcasting,
    ``expand(batch, ...)`` and ``torch.cat`` along other axes keep that promise; ``parameter[0]``
    and reductions over the first axis break it.

    Attributes:
        dims: for each parameter, the number of axes of the tensor that it is broadcast against,
            the batch included. Not needed if the parameter has a first axis of size 1 for the
            batch.

    Examples:
        >>> from opacus_bpclip import register_rule
        >>> class Scale(nn.Module):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.scale = nn.Parameter(torch.ones(features))
        ...
        ...     def forward(self, x):  # [B, T, features]
        ...         return self.scale * x
        >>> @register_rule(Scale)
        ... class ScaleRule(BroadcastRule):
        ...     parameters = ("scale",)
        ...     dims = {"scale": 3}
    """

    parameters: ClassVar[tuple[str, ...]] = ()
    dims: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Check that each parameter leaves an axis for the batch.

        Raises:
            CoverageError: a parameter has no axis for the batch, and ``dims`` names none.
        """
        for name in cls.parameters:
            parameter = module._parameters.get(name)
            if parameter is None:
                continue
            dims = cls.dims.get(name)
            if dims is None and (parameter.dim() == 0 or parameter.shape[0] != 1):
                raise CoverageError(
                    f"{name}, of shape {tuple(parameter.shape)}, has no first axis of size 1 for "
                    f"the batch. Set {cls.__name__}.dims[{name!r}] to the number of axes of the "
                    "tensor that it is broadcast against, the batch included."
                )
            if dims is not None and dims <= parameter.dim():
                raise CoverageError(
                    f"{name}, of shape {tuple(parameter.shape)}, leaves no axis for the batch in a "
                    f"tensor of {dims} axes. Set {cls.__name__}.dims[{name!r}] to the number of "
                    "axes of the tensor that it is broadcast against, the batch included."
                )
        return cls(weight=True, bias=False)

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept any batch."""
        return 1, None

    def copies(self, name: str, parameter: Tensor, batch_size: int) -> Tensor:
        """Return the parameter expanded to one row per example, without copying memory."""
        axes = self.dims.get(name, parameter.dim())
        shape = (1,) * (axes - parameter.dim()) + tuple(parameter.shape)
        return parameter.view(shape).expand(batch_size, *shape[1:])

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Return the input unchanged: it need not be multiplied with the parameters at all."""
        (x,) = inputs
        assert x is not None
        return Prepared(inputs, None, torch.ones(x.shape[0], dtype=torch.bool, device=x.device))

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the norm of ``g``, ``[B, ...]``, which is the example's own gradient."""
        return norms.row_norms(g)
