"""Embedding layers: the columns are one-hot vectors of norm 1, so there is nothing to clip.

Proof: ``docs/rules/embedding.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.rules import exact_norms, norms, precision
from opacus_bpclip.rules.base import Inputs, Prepared, Rule, per_row, trainable
from opacus_bpclip.rules.registry import register_rule


@register_rule(nn.Embedding)
@dataclass(frozen=True)
class EmbeddingRule(Rule):
    """``nn.Embedding``: input ``[B, *]`` of token ids, output ``[B, *, C]``."""

    padding_idx: int | None
    tokens: int

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry.

        Raises:
            CoverageError: an option couples examples, or edits the weight.
        """
        layer = cast(nn.Embedding, module)
        refuse_coupling_options(layer)
        return cls(
            weight=trainable(layer, "weight"),
            bias=False,
            padding_idx=layer.padding_idx,
            tokens=layer.num_embeddings,
        )

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept a single token per example, and any number of axes of tokens."""
        return 1, None

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Return a norm of 1 for each position, and of 0 for padding; ids are always finite."""
        (x,) = inputs
        assert x is not None
        ids = self._positions(x)
        weights = torch.ones(ids.shape, device=x.device)
        if self.padding_idx is not None:
            weights = (ids != self.padding_idx).to(weights.dtype)
        finite = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        return Prepared((x,), weights.unsqueeze(1), finite)

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return the product bound for columns of norm 1."""
        upstream, rounded = self._upstream(g)
        return norms.product_bound(upstream, 1.0) * rounded

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the weighted bound; padding does not count."""
        upstream, rounded = self._upstream(g)
        assert input_norms is not None
        columns = norms.column_norms(input_norms, weight=True, bias=False)
        return norms.weighted_bound(upstream, columns) * rounded

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the norm; for a single position the weighted bound is the norm."""
        upstream, rounded = self._upstream(g)
        if upstream.shape[3] == 1:
            return self.weighted(g, inputs, input_norms)
        (x,) = inputs
        assert x is not None
        assert input_norms is not None
        own = self._exact_bound(upstream[:, 0], self._positions(x), input_norms[:, 0])
        return own * rounded

    def products(self, g: Tensor, inputs: Inputs) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the one-hot vectors first, since the weight's rows are the tokens."""
        (x,) = inputs
        assert x is not None
        ids = self._positions(x)
        rows = torch.arange(self.tokens, device=x.device)
        hot = ids[:, None, :] == rows[:, None]
        if self.padding_idx is not None:
            hot &= (ids != self.padding_idx)[:, None, :]
        upstream = g.reshape(*ids.shape, g.shape[-1]).transpose(1, 2)
        return {"weight": (hot.to(g.dtype).unsqueeze(1), upstream.unsqueeze(1))}

    def _upstream(self, g: Tensor) -> tuple[Tensor, float]:
        """Return ``g`` as ``[B, 1, C, P]``, and its `norms.accumulation`."""
        positions = g.shape[1:-1].numel()
        upstream = g.reshape(g.shape[0], 1, positions, g.shape[-1]).transpose(2, 3)
        # PyTorch adds the positions of one token to the weight's gradient one by one.
        return upstream, norms.accumulation(positions, g.dtype)

    def _exact_bound(self, g: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        # Row v of the gradient is the sum over the positions that hold token v, so the squared
        # norm is the sum of g_p . g_q over pairs of positions with the same token.
        dtype = precision.norm_dtype(g.dtype)
        batch, channels, positions = g.shape
        g_norm = torch.linalg.vector_norm(g, dim=(1, 2), dtype=dtype)
        g_norm = g_norm + norms.underflow(channels * positions, dtype)
        needed = exact_norms.exact_bytes(positions, 1, channels, positions, dtype)
        chunk = exact_norms.exact_chunk(needed, g.device)

        def square_of(rows: slice) -> Tensor:
            counted = g[rows] * weights[rows].to(dtype)[:, None, :]
            unit = counted / per_row(g_norm[rows], counted)
            same = ids[rows][:, :, None] == ids[rows][:, None, :]
            gram = torch.matmul(unit.transpose(1, 2), unit)
            return torch.where(same, gram, 0.0).sum(dim=(1, 2))

        square = exact_norms.in_chunks(batch, chunk, square_of).clamp(min=0)
        return g_norm * torch.sqrt(square + precision.rounding_margin(g.dtype, g.device))

    def _positions(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1:].numel())


def refuse_coupling_options(layer: nn.Embedding | nn.EmbeddingBag) -> None:
    """Refuse the options that couple examples, or edit the weight.

    Raises:
        CoverageError: ``max_norm``, ``scale_grad_by_freq`` or ``sparse`` is set.
    """
    if layer.max_norm is not None:
        raise CoverageError(
            "max_norm rewrites the rows of the weight that the batch looks up, without noise, so "
            "the parameters reveal the batch. Leave max_norm out."
        )
    if layer.scale_grad_by_freq:
        raise CoverageError(
            "scale_grad_by_freq divides an example's gradient by how often a token occurs in the "
            "whole batch, so it depends on other examples. Leave scale_grad_by_freq out."
        )
    if layer.sparse:
        raise CoverageError(
            "a sparse gradient shows which tokens the batch holds, and noise has to be added to "
            "every row. Use sparse=False."
        )
