"""The method written a second time, naively: one example at a time, by plain autograd alone.

Nothing of the package is used. A column ``u_p`` is read off autograd as the gradient of the
layer's output at position ``p`` with respect to the weight, so that padding, strides, dilations
and groups are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Seen:
    """What one layer saw of one example.

    Attributes:
        columns: ``[R, P]``, the norms of its input columns, without the bias's 1.
        bound: the bound on its gradient.
        factor: what its upstream gradient was multiplied by.
        gradient: its own gradient, flattened weight and bias, before that.
    """

    columns: Tensor
    bound: Tensor
    factor: Tensor
    gradient: Tensor


def groups_of(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def positions_last(layer: nn.Module, y: Tensor) -> Tensor:
    """View one example's output as ``[R, C, P]``."""
    if isinstance(layer, nn.Linear):
        return y.reshape(-1, y.shape[-1]).T[None]
    return y.reshape(groups_of(layer), y.shape[1] // groups_of(layer), -1)


def column_norms(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``[R, P]``, the norm of each column that meets the weight."""
    weight = layer.weight.detach().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach()
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    out = positions_last(layer, torch.func.functional_call(layer, parameters, (x.detach(),)))
    norms = torch.zeros(out.shape[0], out.shape[2], dtype=x.dtype)
    for r in range(out.shape[0]):
        for p in range(out.shape[2]):
            (column,) = torch.autograd.grad(out[r, 0, p], weight, retain_graph=True)
            norms[r, p] = column.norm()
    return norms


def clip_input(layer: nn.Module, x: Tensor, max_norm: float | None) -> Tensor:
    if max_norm is None:
        return x
    norms = column_norms(layer, x)
    if isinstance(layer, nn.Linear):
        factor = (max_norm / norms[0]).clamp(max=1).view(*x.shape[:-1], 1)
    else:
        factor = (max_norm / norms.max()).clamp(max=1)
    return x * factor


def whitened(gradient: Tensor, matrices: Tensor) -> Tensor:
    """Multiply a weight's gradient by each group's matrix, row by row."""
    rows = gradient.flatten(1)
    of_group = len(rows) // len(matrices)
    made = [matrices[i // of_group] @ row for i, row in enumerate(rows)]
    return torch.stack(made).view(gradient.shape)


def bound_of(
    layer: nn.Module, x: Tensor, g: Tensor, gradient: Tensor, kind: str, max_norm: float | None
) -> Tensor:
    if kind == "exact":
        return gradient.norm()
    bias = layer.bias is not None
    upstream = positions_last(layer, g).abs()
    if kind == "product":
        return (max_norm**2 + bias) ** 0.5 * upstream.sum(-1).norm()
    columns = (column_norms(layer, x) ** 2 + bias).sqrt()
    return (upstream * columns[:, None, :]).sum(-1).norm()


def contribution(
    model: nn.Sequential,
    x: Tensor,
    target: Tensor,
    limits: dict[str, float],
    kind: str,
    normalize: bool,
    max_norm: float | None,
    joint: float | None = None,
    propagate: str = "clipped",
    matrices: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Seen]:
    """Return what each layer of a sequential model saw of one example, ``x`` of shape [1, ...].

    The loss is ``sum(output * target)``. With a ``joint`` limit, one factor serves all layers. The
    gradients of weights are multiplied by the ``matrices``, ``[R, D, D]`` by name.
    """
    steps: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    value = x
    for name, module in model.named_children():
        # Each step starts at a fresh leaf, so that gradients are carried across by hand.
        leaf = value.detach().clone().requires_grad_()
        inside = leaf
        if hasattr(module, "weight"):
            inside = clip_input(module, leaf, max_norm)
        steps.append((name, module, leaf, module(inside)))
        value = steps[-1][3]
    seen: dict[str, Seen] = {}
    g = target.reshape(value.shape)
    for name, module, leaf, y in reversed(steps):
        if hasattr(module, "weight"):
            parts = [*torch.autograd.grad(y, list(module.parameters()), g, retain_graph=True)]
            if name in matrices:
                parts[0] = whitened(parts[0], matrices[name])
            gradient = torch.cat([part.flatten() for part in parts])
            clipped = clip_input(module, leaf, max_norm)
            bound = bound_of(module, clipped, g, gradient, kind, max_norm)
            factor = factor_of(bound, limits.get(name, 0.0), normalize)
            seen[name] = Seen(column_norms(module, clipped), bound, factor, gradient)
            if joint is None and propagate == "clipped":
                g = g * factor
        (g,) = torch.autograd.grad(y, leaf, g)
    if joint is not None:
        total = torch.stack([layer.bound for layer in seen.values()]).norm()
        common = factor_of(total, joint, normalize)
        seen = {name: replace(layer, factor=common) for name, layer in seen.items()}
    return seen


def factor_of(bound: Tensor, limit: float, normalize: bool) -> Tensor:
    if normalize:
        return limit / (bound + 0.01)
    return (limit / bound).clamp(max=1)
