"""The two primitives, `clip_input` and `clip_upstream`, and the gradient scaling at the root.

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

from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.norms import rounding_margin
from opacus_bpclip.rules.base import Prepared, Rule, per_row


def scale_input(x: Tensor, rule: Rule, max_norm: float) -> Tensor:
    """Scale every column of ``x`` down to a norm of at most ``max_norm``; evaluation's half.

    Args:
        x: the layer's input, ``[B, ...]``; rows that are not finite come out as nan.
        rule: the layer's rule.
        max_norm: largest L2 norm of a column.
    """
    return _prepare(x, rule, max_norm).x


def clip_input(x: Tensor, rule: Rule, max_norm: float | None) -> Prepared:
    """Clip a layer's input and measure it for `clip_upstream`.

    The factor is a constant in the backward pass: the gradient is multiplied by it, nothing flows
    through it. Guarantee: every column of the result that enters the layer's product has norm at
    most ``max_norm``, rounding included.

    Args:
        x: the layer's input, ``[B, ...]``.
        rule: the layer's rule.
        max_norm: largest L2 norm of a column; ``None`` measures without clipping.
    """
    x, norms, finite = _prepare(x, rule, max_norm)
    if norms is not None:
        norms = _zero_rows(norms, finite)
    return Prepared(_zero_rows(x, finite), norms, finite)


def clip_upstream(
    y: Tensor,
    clipped: Prepared,
    rule: Rule,
    limit: Tensor,
    *,
    bound: str = "weighted",
    upstream: str = "clip",
    max_norm: float | None = None,
) -> Tensor:
    """Return ``y``; in the backward pass, scale each example's gradient to respect ``limit``.

    Guarantee: with ``G`` the gradient that leaves this function towards the layer and ``u`` the
    columns of ``clipped.x``, ``norm(sum_p G_p u_p^T) <= limit`` for every example, and an
    example's factor depends on that example alone. Source: design section 3; proofs in
    ``docs/guarantee.md``.

    Args:
        y: the layer's output, ``[B, ...]``.
        clipped: the layer's input, from `clip_input`.
        rule: the layer's rule.
        limit: the layer's sensitivity Delta_l, a float64 scalar tensor on the CPU. It is read in
            the backward pass, so that one compiled graph serves every value.
        bound: ``"product"``, ``"weighted"`` or ``"exact"``.
        upstream: ``"clip"`` scales down only, ``"normalize"`` to the limit in either direction.
        max_norm: what the input was clipped to; needed by ``"product"``.
    """
    keep = rule.keeps(bound)
    x = clipped.x if keep.x else None
    norms = clipped.norms if keep.norms else None
    return _ClipUpstream.apply(
        y, x, norms, clipped.finite, limit, rule, bound, max_norm, upstream == "normalize"
    )


def scale_gradient(y: Tensor, factor: int) -> Tensor:
    """Return ``y``; in the backward pass, multiply its gradient by ``factor``.

    At the root's outputs, with the number of examples as the factor, this turns the gradients of
    a mean loss into each example's own gradient, before anything is clipped.
    """
    return _ScaleGradient.apply(y, factor)


class _ClipUpstream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor | None,
        norms: Tensor | None,
        finite: Tensor,
        limit: Tensor,
        rule: Rule,
        kind: str,
        max_norm: float | None,
        normalize: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, norms, finite)
        # Not saved but looked at: it may be set between forward and backward.
        ctx.limit = limit
        ctx.rule, ctx.kind, ctx.max_norm, ctx.normalize = rule, kind, max_norm, normalize
        out = _alias(y)
        if _may_rewrite(finite):
            # The example was zeroed where the layer multiplies; nobody may take that for an output.
            out.masked_fill_(~per_row(finite, out), float("nan"))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, norms, finite = ctx.saved_tensors
        bound = ctx.rule.bound(ctx.kind, g, x, norms, ctx.max_norm)
        factor = ctx.limit * (1 - rounding_margin(g.dtype, g.device)) / bound
        if not ctx.normalize:
            factor = factor.clamp(max=1)
        keep = finite & bound.isfinite()
        factor = torch.where(keep, factor, 0.0).to(g.dtype)
        clipped = _zero_rows(g * per_row(factor, g), keep)
        return clipped, None, None, None, None, None, None, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return _alias(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.factor, None


def _prepare(x: Tensor, rule: Rule, max_norm: float | None) -> Prepared:
    if max_norm is not None and x.is_floating_point():
        max_norm *= 1 - rounding_margin(x.dtype, x.device)
    return rule.prepare(x, max_norm)


def _alias(y: Tensor) -> Tensor:
    # Shares y's storage and version counter without being a view of it, so that an activation may
    # work in place on the result. A traced graph has no storage to share; its copy is fused away.
    return y.clone() if torch.compiler.is_compiling() else y.detach()


def _may_rewrite(keep: Tensor) -> bool:
    # Reading a flag stalls an accelerator and breaks a traced graph: there, always rewrite.
    return torch.compiler.is_compiling() or keep.device.type != "cpu" or not bool(keep.all())


def _zero_rows(x: Tensor, keep: Tensor) -> Tensor:
    # Not a multiplication: zero times nan is nan.
    return torch.where(per_row(keep, x), x, x.new_zeros(())) if _may_rewrite(keep) else x
