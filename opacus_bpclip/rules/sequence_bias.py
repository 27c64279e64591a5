"""Opacus's SequenceBias, which appends one learned token to every sequence.

Part of ``DPMultiheadAttention(add_bias_kv=True)``. Proof: ``docs/rules/attention.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules import norms, precision
from opacus_bpclip.rules.base import Inputs, Prepared, Rule, trainable
from opacus_bpclip.rules.registry import register_rule


@register_rule("opacus.layers.dp_multihead_attention.SequenceBias")
@dataclass(frozen=True)
class SequenceBiasRule(Rule):
    """``SequenceBias``: input ``[B, L, E]`` or ``[L, B, E]``, output one token longer.

    Attributes:
        batch_first: the layer's own ``batch_first``, whatever the model's layout.
    """

    parameters: ClassVar[tuple[str, ...]] = ("bias",)

    batch_first: bool

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry."""
        batch_first = bool(module.batch_first)
        return cls(weight=False, bias=trainable(module, "bias"), batch_first=batch_first)

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept batches of sequences."""
        return 3, 3

    def batch_axis(self, default: int) -> int:
        """Return the batch axis that the layer's ``batch_first`` gives."""
        return 0 if self.batch_first else 1

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Return the input unchanged: it is not multiplied with the bias."""
        (x,) = inputs
        assert x is not None
        return Prepared(inputs, None, x.isfinite().flatten(1).all(dim=1))

    def by_example(self, g: Tensor, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the gradient of the last token, which is the bias."""
        return {"bias": g[:, -1]}

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the norm of the gradient of the last token, which is the bias."""
        # The addend limits how far the whole upstream gradient can be scaled up where the bias's
        # own gradient is tiny.
        others = norms.smallest_column(precision.norm_dtype(g.dtype)) * norms.row_norms(g)
        return norms.row_norms(g[:, -1]) + others
