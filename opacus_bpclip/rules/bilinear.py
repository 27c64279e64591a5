"""Bilinear layers: linear layers on the outer product of their two inputs.

Proof: ``docs/rules/bilinear.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules import exact_norms
from opacus_bpclip.rules import norms as bounds
from opacus_bpclip.rules.base import Inputs, Prepared, trainable
from opacus_bpclip.rules.linear import LinearRule
from opacus_bpclip.rules.registry import register_rule


@register_rule(nn.Bilinear)
@dataclass(frozen=True)
class BilinearRule(LinearRule):
    """``nn.Bilinear``: inputs ``[B, *, D1]`` and ``[B, *, D2]``, output ``[B, *, C]``.

    Attributes:
        in_features: the size of the outer product, ``D1 * D2``.
    """

    arguments: ClassVar[int] = 2

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry."""
        layer = cast(nn.Bilinear, module)
        return cls(
            weight=trainable(layer, "weight"),
            bias=trainable(layer, "bias"),
            in_features=layer.in1_features * layer.in2_features,
        )

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Clip each position of each input to ``sqrt(max_norm)``: outer products obey ``max_norm``.

        The two inputs get factors of their own. A common factor could leave one vector very large
        and the other vanishingly small.
        """
        each = None if max_norm is None else math.sqrt(max_norm)
        first, second = (super(BilinearRule, self).prepare((x,), each) for x in inputs)
        assert first.norms is not None
        assert second.norms is not None
        norms = first.norms * second.norms
        norms = norms + bounds.underflow(1, norms.dtype)
        finite = first.finite & second.finite & norms.isfinite().all(dim=2)[:, 0]
        scales = first.scales + second.scales
        return Prepared(first.inputs + second.inputs, norms, finite, scales)

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Build the outer products of a few examples at a time, and measure them."""
        positions = g.shape[1:-1].numel()
        if positions == 1:
            return self.weighted(g, inputs, input_norms)
        one, other = inputs
        assert one is not None
        assert other is not None
        assert input_norms is not None
        needed = exact_norms.exact_bytes(positions, 1, g.shape[-1], self.in_features, g.dtype)
        chunk = exact_norms.exact_chunk(needed, g.device)
        exact = super().exact

        def of(rows: slice) -> Tensor:
            outer = (one[rows].unsqueeze(-1) * other[rows].unsqueeze(-2)).flatten(-2)
            return exact(g[rows], (outer,), input_norms[rows])

        return exact_norms.in_chunks(g.shape[0], chunk, of)
