"""A use of a linear layer or a convolution: bounds, sums and gradients as matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opacus_bpclip.clipping.at_once import clip_at_once
from opacus_bpclip.clipping.factors import Factors, Measured, Target, joined, measured, padded
from opacus_bpclip.clipping.use import Clipped, FactorsOf, Sums, Use
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import Bound, FusedRule
from opacus_bpclip.rules.base import per_row, zero_rows
from opacus_bpclip.rules.cancellation import cancellation_factor
from opacus_bpclip.rules.exact_norms import chunks, exact_chunk, gram_is_cheaper
from opacus_bpclip.rules.fused import Scaled
from opacus_bpclip.rules.norms import row_norms
from opacus_bpclip.rules.precision import norm_dtype, wide

# Per-example gradients are kept until their factors are known if they have at most this many times
# the numbers of input and upstream gradient, which are then not needed any more.
_OWN_KEPT = 1


class Measurement(NamedTuple):
    """The measurement of an input.

    Attributes:
        factor: the factors of its columns, 0 in rows that are not finite; ``None`` for 1.
        columns: the norms of the scaled columns, from `with_one`; ``None`` if the bound needs none.
        finite: ``[B]`` bool, which rows are finite; ``None`` for all.
    """

    factor: Tensor | None
    columns: Tensor | None
    finite: Tensor | None


class FusedUse(Use):
    """A use of a linear layer or a convolution.

    Args:
        layer: the layer.
        rule: the rule of its gradients.
        bound: the bound on an example's gradient.
        max_input_norm: the norm that the input's columns are clipped to; ``None`` for no clipping.
        target: the norm that gradients are scaled to.
        examples: the number that a mean loss has divided the upstream gradient by.
        g: upstream gradient, batch first.
        x: the input, not scaled.
        weight: the layer's weight.
        measurement: the measurement of the input.
        wants_input: whether the input's gradient is needed.
    """

    reads_parameters = False

    def __init__(
        self,
        layer: Layer,
        rule: FusedRule,
        bound: Bound,
        max_input_norm: float | None,
        target: Target,
        examples: int,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        measurement: Measurement,
        wants_input: bool,
    ) -> None:
        self.layer, self.rule = layer, rule
        self.bound, self.max_input_norm, self.target = bound, max_input_norm, target
        self.g, self.x, self.weight = g, x, weight
        self.factor, self.columns, self.finite = measurement
        self.examples, self.wants_input = examples, wants_input
        # Memory that temporaries reuse: fresh memory is slow.
        self._scratch: Tensor | None = None
        self._cancellation: Tensor | None = None
        self._order: Tensor | None = None
        self._versions = () if torch.compiler.is_compiling() else (g._version, x._version)
        self._own: list[Tensor] | None = None  # per-example gradients of the weight, if kept
        self._bias_sums: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the gradients."""
        return norm_dtype(self.g.dtype)

    def measure(self) -> Measured:
        """Return the bounds of the option ``bound``."""
        keeps = self.weight.numel() <= _OWN_KEPT * (self.x[:1].numel() + self.g[:1].numel())
        if not self._makes_own(keeps=keeps):
            return self.measure_by_bound()
        found: list[Measured] = []
        cancellations, gradients = [], []
        for rows in chunks(
            self.g.shape[0], exact_chunk(self.rule.own_bytes(self.g, self.weight), self.g.device)
        ):
            own, each, cancellation = self._own_of(rows)
            found.append(each)
            cancellations.append(cancellation)
            if keeps:
                gradients.append(own)
        self._cancellation = torch.cat(cancellations)
        if keeps:
            self._own = gradients
            if self.rule.bias:
                self._bias_sums = self.rule.upstream(wide(self.g)).sum(dim=3).flatten(1)
        return joined(found)

    def _makes_own(self, *, keeps: bool) -> bool:
        """Return whether to build the per-example gradients in order to measure them."""
        rule = self.rule
        if not rule.sums_own(self.bound, self.g):
            return False
        channels, positions = rule.upstream(self.g).shape[2:]
        return keeps or not gram_is_cheaper(positions, channels, rule.column_size())

    def _own_of(self, rows: slice) -> tuple[Tensor, Measured, Tensor]:
        """Return the gradients of some examples, their bounds, and their cancellation factors."""
        assert self.columns is not None
        g, columns = wide(self.g[rows]), self.columns[rows]
        finite = None if self.finite is None else self.finite[rows]
        own = self.rule.own_gradients(self._scaled(g, rows), wide(self.x[rows]), self.weight)
        bound = self.rule.bound_of_own(own, g, columns)
        # Where the positions cancel, their sum may be nothing but rounding error.
        limit = self.target.unscaled() / max(self.examples, 1)
        cancelled = row_norms(g) * row_norms(columns)
        cancellation = cancellation_factor(bound, cancelled, g.dtype, limit)
        return own, self._measured(bound, g, columns, finite), cancellation

    def _measured(
        self, bound: Tensor, g: Tensor, columns: Tensor | None, finite: Tensor | None
    ) -> Measured:
        return measured(
            bound,
            finite,
            size=partial(self.bound.size_of_scaled, self.rule, g, columns),
            least=self.bound.least(self.rule, g.dtype, self.max_input_norm),
            examples=self.examples,
        )

    def measure_by_bound(self) -> Measured:
        """Return the bounds without building per-example gradients."""
        g = wide(self.g)
        scaled = Scaled(wide(self.x), self.columns, self.factor, self.max_input_norm)
        bound = self.bound.of_scaled(self.rule, g, scaled, self._scratch)
        return self._measured(bound, g, self.columns, self.finite)

    def _scaled(self, g: Tensor, rows: slice) -> Tensor:
        """Return some examples' upstream gradients times the factors of the input's columns."""
        if self.factor is None:
            return g
        return g * self.rule.over_output(self.factor[rows].to(g.dtype), g)

    def sums(self, factors: Factors) -> Sums:
        """Return the sums, each made by one product over all examples."""
        by, keep = factors
        if self._cancellation is not None:
            by = by * self._cancellation.to(by.dtype)
        if self._own is not None:
            return self._sums_of_own(by, keep)
        sums = {}
        g = zero_rows(wide(self.g), keep)
        if self.rule.bias:
            sums["bias"] = self.rule.bias_gradient(g, by) * self.examples
        if self.rule.weight:
            _, dw = self._products(g, by, (False, True))
            assert dw is not None
            sums["weight"] = dw
        return sums

    def _sums_of_own(self, by: Tensor, keep: Tensor | None) -> Sums:
        assert self._own is not None
        total: Tensor | None = None
        start = 0
        for own in self._own:
            rows = slice(start, start + own.shape[0])
            start += own.shape[0]
            flat = zero_rows(own.flatten(1), None if keep is None else keep[rows])
            part = by[rows].to(flat.dtype) @ flat
            total = part if total is None else total + part
        assert total is not None
        dw = total.view(self.weight.shape) * self.examples
        sums = {"weight": dw}
        if self._bias_sums is not None:
            sums["bias"] = by @ zero_rows(self._bias_sums, keep) * self.examples
        return sums

    def _products(
        self, g: Tensor, by: Tensor | None, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the input and the weight, if wanted.

        Args:
            g: upstream gradient; must be finite if the weight's gradient is wanted.
            by: ``[B]``, the examples' factors; ``None`` for 1.
            wanted: whether the gradients of input and weight are wanted.
        """
        joint = self.factor
        if by is not None:
            joint = by.view(-1, 1, 1)
            if self.factor is not None:
                joint = joint * self.factor.to(joint.dtype)
        if joint is not None:
            over = self.rule.over_output(joint.to(g.dtype), g)
            scratch = self._scratch
            fits = scratch is not None and scratch.dtype == g.dtype
            g = torch.mul(g, over, out=scratch if fits else None)
        # Masked only here: a masked copy made in the forward pass would live as long as the graph.
        x = zero_rows(self.x, self.finite) if wanted[1] else self.x
        # Under autocast, input and weight have another dtype than the output.
        x, weight = x.to(g.dtype), self.weight.to(g.dtype)
        return self.rule.gradients(g, x, weight, multiplier=self.examples, wanted=wanted)

    def sorted_by(self, rows: Tensor) -> FusedUse:
        """Note which row of this use each example is in, for packed sequences.

        Args:
            rows: ``[B]``, the row of each example; a row that this use does not have is zero.
        """
        self._order = rows
        return self

    def in_order(self) -> FusedUse:
        """Return the use with example ``i`` in row ``i``, without gradients of its inputs."""
        if self._order is None:
            return self
        order, rows = self._order, self._order.shape[0]

        def put(x: Tensor | None, *, fill: bool = False) -> Tensor | None:
            return None if x is None else padded(x, rows, fill=fill)[order]

        measurement = Measurement(put(self.factor), put(self.columns), put(self.finite, fill=True))
        return FusedUse(
            self.layer,
            self.rule,
            self.bound,
            self.max_input_norm,
            self.target,
            self.examples,
            padded(self.g, rows)[order],
            padded(self.x, rows)[order],
            self.weight,
            measurement,
            wants_input=False,
        )

    def has_changed(self) -> bool:
        """Return whether the upstream gradient or the input was changed in place."""
        # If per-example gradients are kept, the sums depend on neither.
        return self._own is None and self._versions != (self.g._version, self.x._version)

    def input_gradients(self, factors: Factors | None) -> tuple[Tensor | None, ...]:
        """Multiply the upstream gradient with the weight."""
        if not self.wants_input:
            return (None,)
        g, by = self.g, None
        if factors is not None:
            g, by = zero_rows(g, factors.keep), factors.factor
        dx, _ = self._products(g, by, (True, False))
        return (dx,)

    def own(self, rows: slice) -> Sums:
        """Return the gradients of some examples, with rounding errors suppressed."""
        g, x = self._kept_of(rows), wide(self.x[rows])
        sums = {}
        if self.rule.weight:
            sums["weight"] = self.rule.own_gradients(self._scaled(g, rows), x, self.weight)
        if self.rule.bias:
            sums["bias"] = self.rule.upstream(g).sum(dim=3).flatten(1)
        return sums

    def _kept_of(self, rows: slice) -> Tensor:
        """Return the upstream gradients of some examples times their cancellation factors."""
        g, factor = wide(self.g[rows]), self._cancellation
        return g if factor is None else g * per_row(factor[rows].to(g.dtype), g)

    def matrix_columns(self, rows: slice) -> Tensor:
        """Return the columns of some examples' scaled inputs, ``[b, R, D, P]``."""
        x = wide(self.x[rows])
        if self.factor is not None:
            x = x * self.rule.spread(self.factor[rows].to(x.dtype), x)
        return self.rule.columns(x)

    def matrices(self, rows: slice) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the factors of the weight's gradient, in the order of the weight's axes."""
        if not self.rule.weight:
            return {}
        pair = self.rule.upstream(self._kept_of(rows)), self.matrix_columns(rows)
        return {"weight": self.rule.oriented(*pair)}

    def clip(self, factors_of: FactorsOf) -> Clipped:
        """Clip this use by itself, with few passes over memory."""
        return clip_at_once(self, factors_of)
