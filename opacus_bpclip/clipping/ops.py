"""The two primitives, `clip_input` and `clip_upstream`.

Pure functions on tensors. They trace under ``torch.compile`` without a graph break, leave the
layer's output free for in-place activations, and never look at one example to treat another.

Edge cases:

| example | forward | contribution to the layer's gradient |
|---|---|---|
| input not finite, or its squared norm overflows | output row is nan | exactly zero |
| upstream gradient not finite, or its bound overflows | unchanged | exactly zero |
| upstream gradient zero | unchanged | exactly zero, also with ``normalize`` |
| empty batch | empty | zeros |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opacus_bpclip.clipping.first_order import first_order
from opacus_bpclip.rules.base import Inputs, Prepared, Rule, per_row, where_needed, zero_rows
from opacus_bpclip.rules.norms import rounding_margin


def scale_input(inputs: Inputs, rule: Rule, max_norm: float) -> Inputs:
    """Scale every column of a layer's inputs down to ``max_norm``; evaluation's half.

    Args:
        inputs: the layer's inputs, batch first; rows that are not finite come out as nan.
        rule: the layer's rule.
        max_norm: largest L2 norm of a column.
    """
    prepared = _prepare(inputs, rule, max_norm)
    return _attached(inputs, prepared.inputs, prepared.scales, divisor=1)


def clip_input(
    inputs: Inputs, rule: Rule, max_norm: float | None, *, mean: bool = False
) -> Prepared:
    """Clip a layer's inputs and measure them for `clip_upstream`.

    The factor is a constant in the backward pass: the gradient is multiplied by it, nothing flows
    through it. Guarantee: every column of the result that enters the layer's product has norm at
    most ``max_norm``, rounding included.

    Args:
        inputs: the layer's inputs, batch first.
        rule: the layer's rule.
        max_norm: largest L2 norm of a column; ``None`` measures without clipping.
        mean: whether the loss is a mean over the batch; as for `clip_upstream`.
    """
    prepared = _prepare(inputs, rule, max_norm)
    norms, keep = prepared.norms, where_needed(prepared.finite)
    if norms is not None:
        norms = zero_rows(norms, keep)
    scales = tuple(x if x is None else zero_rows(x, keep) for x in prepared.scales)
    divisor = rule.batch_sizes(inputs)[0] if mean else 1
    clipped = _attached(inputs, rule.silenced(prepared), scales, divisor)
    return Prepared(clipped, norms, prepared.finite, scales)


def clip_upstream(
    y: Tensor,
    clipped: Prepared,
    rule: Rule,
    limit: Tensor,
    *,
    bound: str = "weighted",
    upstream: str = "clip",
    max_norm: float | None = None,
    batch_axis: int = 0,
    mean: bool = False,
) -> Tensor:
    """Return ``y``; in the backward pass, scale each example's gradient to respect ``limit``.

    With a loss that is a mean over ``n`` examples, every gradient between layers is divided by
    ``n``. The layer's own stretch of the backward pass, from here to `clip_input`, works with the
    examples' own gradients: multiplied by ``n`` here, before anything is clipped, and divided by
    ``n`` there.

    Guarantee: with ``G`` the gradient that leaves this function towards the layer and ``u`` the
    columns of the clipped input, ``norm(sum_p G_p u_p^T) <= limit`` for every example, and an
    example's factor depends on that example alone. Source: design section 3; proofs in
    ``docs/guarantee.md``.

    Args:
        y: the layer's output, with the batch on ``batch_axis``.
        clipped: the layer's inputs, from `clip_input`.
        rule: the layer's rule.
        limit: the layer's sensitivity Delta_l, a float64 scalar tensor on the CPU. It is read in
            the backward pass, so that one compiled graph serves every value.
        bound: ``"product"``, ``"weighted"`` or ``"exact"``.
        upstream: ``"clip"`` scales down only, ``"normalize"`` to the limit in either direction.
        max_norm: what the inputs were clipped to; needed by ``"product"``.
        batch_axis: which axis of ``y`` is the batch.
        mean: whether the loss is a mean over the batch.
    """
    keep = rule.keeps(bound)
    inputs = clipped.inputs if keep.inputs else ()
    norms = clipped.norms if keep.norms else None
    clip = _Clip(rule, bound, upstream == "normalize", max_norm, batch_axis, mean, limit)
    return _ClipUpstream.apply(y, clip, norms, clipped.finite, *inputs)


class Factors(NamedTuple):
    """What the examples' gradients are to be multiplied by.

    Attributes:
        factor: ``[B]``, of the gradients' dtype; 0 where nothing is kept.
        keep: ``[B]`` bool; where false, the gradient may not be finite and is to be replaced.
            ``None`` where it is nowhere false.
    """

    factor: Tensor
    keep: Tensor | None


def clip_factors(
    bound: Tensor,
    finite: Tensor | None,
    limit: Tensor,
    dtype: torch.dtype,
    *,
    size: Callable[[], Tensor] | None = None,
    least: float = 0.0,
    examples: int = 1,
    normalize: bool = False,
) -> Factors:
    """Return what brings each example's gradient, times ``examples``, within ``limit``.

    Guarantee: ``factor * examples * bound <= limit``, with room for the rounding of gradients of
    ``dtype``; an example's factor depends on ``examples`` by rounding alone.

    Args:
        bound: ``[B]``, on the norms of the gradients at hand.
        finite: ``[B]`` bool, which examples' inputs are finite; ``None`` for all.
        limit: a scalar tensor.
        dtype: of the gradients.
        size: returns ``[B]``, what must be in range for the bound to be, see `Rule.size`; called
            only if needed. ``None`` for the bound itself.
        least: what part of ``size`` the bound is at least.
        examples: by what a mean loss has divided the gradients at hand.
        normalize: scale up, too.
    """
    part = (1 - rounding_margin(dtype, bound.device)) / max(examples, 1)
    # As a number where that is possible: a scalar tensor costs a kernel for each operation.
    factor = (limit if torch.compiler.is_compiling() else limit.item()) * part / bound
    if not normalize:
        factor = factor.clamp(max=1)
    # No square of what is below overflows, so that this threshold is the first to be met, and it is
    # the same for every `examples`. Comparing with nan gives False.
    largest = torch.finfo(bound.dtype).max ** 0.5 / (16 * max(examples, 1))
    if size is None:
        least = 1.0
    if finite is None and least > 0 and _all_below(bound, largest * min(least, 1.0)):
        return Factors(factor.to(dtype), None)
    if size is not None and least < 1:
        bound = torch.maximum(bound, size())  # nan if one of them is
        if finite is None and _all_below(bound, largest):
            return Factors(factor.to(dtype), None)
    keep = bound < largest
    if finite is not None:
        keep &= finite
    return Factors(zero_rows(factor, keep).to(dtype), where_needed(keep))


def _all_below(bound: Tensor, limit: float) -> bool:
    """Return whether it costs nothing to know that every bound is below a limit, and it is."""
    if torch.compiler.is_compiling() or bound.device.type != "cpu" or not len(bound):
        return False
    return bool(bound.max() < limit)


class _Clip(NamedTuple):
    """How to clip one layer's upstream gradient."""

    rule: Rule
    kind: str
    normalize: bool
    max_norm: float | None
    batch_axis: int
    mean: bool
    limit: Tensor  # not saved but looked at: it may be set between forward and backward


class _ClipUpstream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, clip: _Clip, norms: Tensor | None, finite: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(norms, finite, *inputs)
        ctx.clip = clip
        out = _alias(y)
        keep = where_needed(finite)
        if keep is not None:
            # The example was zeroed where the layer multiplies; nobody may take that for an output.
            rows = out.movedim(clip.batch_axis, 0)
            rows.masked_fill_(~per_row(keep, rows), float("nan"))
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        norms, finite, *inputs = ctx.saved_tensors
        clip: _Clip = ctx.clip
        g = g.movedim(clip.batch_axis, 0)
        examples = g.shape[0] if clip.mean else 1
        if clip.normalize:
            # Scaling up turns what underflow took into something; it must take the same whatever
            # the size of the batch.
            g, examples = g * examples, 1
        bound = clip.rule.bound(clip.kind, g, tuple(inputs), norms, clip.max_norm)
        factor, keep = clip_factors(
            bound,
            where_needed(finite),
            clip.limit,
            g.dtype,
            size=lambda: clip.rule.size(clip.kind, g, norms),
            examples=examples,
            normalize=clip.normalize,
        )
        clipped = zero_rows(g * per_row(factor * examples, g), keep)
        unused = [None] * (3 + len(inputs))
        return clipped.movedim(0, clip.batch_axis), *unused


class _Attach(torch.autograd.Function):
    """Put a prepared input in the input's place; its gradient is scaled and divided."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, prepared: Tensor, scale: Tensor | None, divisor: int
    ) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.divisor = divisor
        return _alias(prepared)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors
        return (g / ctx.divisor if scale is None else g * (scale / ctx.divisor)), None, None, None


def _attached(inputs: Inputs, values: Inputs, scales: Inputs, divisor: int) -> Inputs:
    scales = scales or (None,) * len(inputs)
    return tuple(
        value
        if x is None or value is None or not x.requires_grad
        else _Attach.apply(x, value, scale, divisor)
        for x, value, scale in zip(inputs, values, scales, strict=True)
    )


def _prepare(inputs: Inputs, rule: Rule, max_norm: float | None) -> Prepared:
    floating = next((x for x in inputs if x is not None and x.is_floating_point()), None)
    if max_norm is not None and floating is not None:
        max_norm *= 1 - rounding_margin(floating.dtype, floating.device)
    with torch.no_grad():
        return rule.prepare(tuple(x if x is None else x.detach() for x in inputs), max_norm)


def _alias(y: Tensor) -> Tensor:
    # Shares y's storage and version counter without being a view of it, so that an activation may
    # work in place on the result. A traced graph has no storage to share; its copy is fused away.
    return y.clone() if torch.compiler.is_compiling() else y.detach()
