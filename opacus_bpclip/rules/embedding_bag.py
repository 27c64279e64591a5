"""EmbeddingBag layers: a bag is one example, and its column holds the counts of its tokens.

Proof: ``docs/rules/embedding_bag.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules import norms, precision
from opacus_bpclip.rules.base import (
    Inputs,
    Prepared,
    Rule,
    trainable,
    where_needed,
    zero_rows,
)
from opacus_bpclip.rules.embedding import refuse_coupling_options
from opacus_bpclip.rules.registry import register_rule


class _Bags(NamedTuple):
    """The ``N`` tokens of ``B`` bags, concatenated."""

    ids: Tensor  # [N]
    bag: Tensor  # [N], the bag of each token
    weights: Tensor | None  # [N]
    number: int  # B


@register_rule(nn.EmbeddingBag)
@dataclass(frozen=True)
class EmbeddingBagRule(Rule):
    """``nn.EmbeddingBag``: ids ``[B, N]``, or ``[N]`` with offsets ``[B]``; output ``[B, C]``.

    With ``include_last_offset`` there are ``B + 1`` offsets. ``per_sample_weights`` may be computed
    by other layers; each bag's weights belong to its example.
    """

    arguments: ClassVar[int] = 3

    mode: str
    padding_idx: int | None
    include_last_offset: bool

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry.

        Raises:
            CoverageError: an option couples examples, or edits the weight.
        """
        layer = cast(nn.EmbeddingBag, module)
        refuse_coupling_options(layer)
        return cls(
            weight=trainable(layer, "weight"),
            bias=False,
            mode=layer.mode,
            padding_idx=layer.padding_idx,
            include_last_offset=layer.include_last_offset,
        )

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept one row per bag, or all bags concatenated."""
        return 1, 2

    def batch_axis(self, default: int) -> int:
        """Return 0: bags are rows in PyTorch, whatever the model's layout."""
        return 0

    def batch_sizes(self, inputs: Inputs) -> tuple[int, ...]:
        """Return the number of bags."""
        return (self._bag_count(inputs),)

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Return the inputs unchanged: `exact` computes the columns' norms, so none is clipped."""
        ids, offsets, weights = inputs
        assert ids is not None
        if offsets is not None:
            self._check_offsets(offsets, ids.numel())
        count = self._bag_count(inputs)
        if weights is None:
            return Prepared(inputs, None, torch.ones(count, dtype=torch.bool, device=ids.device))
        # A column's norm is at most the sum of its absolute weights: if that sum's square is
        # finite, so is the norm's.
        total = torch.zeros(count, dtype=precision.norm_dtype(weights.dtype), device=ids.device)
        total = total.index_add(0, self._bags(inputs).bag, weights.flatten().abs().to(total.dtype))
        return Prepared(inputs, None, total.square().isfinite())

    def silenced(self, prepared: Prepared) -> Inputs:
        """Return the inputs, with zero weights in bags that are not finite."""
        ids, offsets, weights = prepared.inputs
        if weights is None:
            return prepared.inputs
        keep = where_needed(prepared.finite[self._bags(prepared.inputs).bag])
        return ids, offsets, zero_rows(weights.flatten(), keep).view_as(weights)

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the norm of the gradient; a bag is one position, so all three bounds equal it."""
        dtype = precision.norm_dtype(g.dtype)
        if self.mode == "max":
            columns = torch.ones(g.shape[0], dtype=dtype, device=g.device)
        else:
            columns = self._column_norms(self._bags(inputs), dtype)
        columns = norms.column_norms(columns.view(-1, 1, 1), weight=True, bias=False)
        return norms.weighted_bound(g[:, None, :, None], columns)

    def _column_norms(self, bags: _Bags, dtype: torch.dtype) -> Tensor:
        """Return an upper bound on the norm of each bag's weighted counts, rounding included."""
        zeros = torch.zeros(bags.number, dtype=dtype, device=bags.ids.device)
        counted = torch.ones(bags.ids.shape, dtype=dtype, device=bags.ids.device)
        if self.padding_idx is not None:
            counted = (bags.ids != self.padding_idx).to(dtype)
        sizes = zeros.index_add(0, bags.bag, counted)
        if self.mode == "mean":
            weights = counted / sizes.clamp(min=1)[bags.bag]
        else:
            weights = counted if bags.weights is None else counted * bags.weights.to(dtype)
        # Sorted by bag and token, equal pairs are neighbours and form one segment.
        order = torch.argsort(bags.ids, stable=True)
        order = order[torch.argsort(bags.bag[order], stable=True)]
        ids, bag = bags.ids[order], bags.bag[order]
        first = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        first[1:] = (ids[1:] != ids[:-1]) | (bag[1:] != bag[:-1])
        segment = first.cumsum(0) - 1
        bag_of_segment = torch.zeros_like(bag).index_copy(0, segment, bag)
        empty = torch.zeros(ids.shape, dtype=dtype, device=ids.device)

        def norm(values: Tensor) -> Tensor:
            rows = empty.index_add(0, segment, values[order])
            return zeros.index_add(0, bag_of_segment, rows.square()).sqrt()

        # Weights of one token may cancel, but the rounding errors of the summands do not.
        slack = precision.rounding_margin(dtype, zeros.device) + torch.finfo(dtype).eps * sizes
        vanished = norms.underflow(1, dtype) * sizes.sqrt()
        return norm(weights) + slack * norm(weights.abs()) + vanished

    def _bag_count(self, inputs: Inputs) -> int:
        ids, offsets, _ = inputs
        assert ids is not None
        return len(ids) if offsets is None else max(len(offsets) - self.include_last_offset, 0)

    def _bags(self, inputs: Inputs) -> _Bags:
        ids, offsets, weights = inputs
        assert ids is not None
        flat = None if weights is None else weights.flatten()
        index = torch.arange(ids.numel(), device=ids.device)
        if offsets is None:
            bag = index // max(math.prod(ids.shape[1:]), 1)
        else:
            starts = offsets[:-1] if self.include_last_offset else offsets
            bag = torch.searchsorted(starts.long().contiguous(), index, right=True) - 1
        return _Bags(ids.flatten(), bag, flat, self._bag_count(inputs))

    def _check_offsets(self, offsets: Tensor, tokens: int) -> None:
        """Refuse offsets for which PyTorch's backward pass uses other bags than its forward pass.

        Raises:
            RuntimeError: the offsets do not start at 0, fall, or end before the ids do.
        """
        # An asynchronous assertion: reading the flag would stall an accelerator.
        torch._assert_async(
            (offsets[1:] >= offsets[:-1]).all() & (offsets[:1] == 0).all(),
            "EmbeddingBag: the offsets must start at 0 and never decrease. Otherwise PyTorch adds "
            "one example's gradient to another example's bag. Sort the offsets.",
        )
        if self.include_last_offset:
            torch._assert_async(
                (offsets[-1:] == tokens).all(),
                "EmbeddingBag: with include_last_offset=True the last offset must be the number of "
                "ids. PyTorch's backward pass gives a gradient to the ids after it, although no "
                "example's output depends on them. Cut the ids off at the last offset.",
            )
