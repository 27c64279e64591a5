"""Split the sensitivity over the layers: from ``max_grad_norm`` to ``Delta_l``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from opacus_bpclip.errors import CoverageError


def layer_fractions(
    sizes: Mapping[str, int], allocation: str | Mapping[str, float]
) -> dict[str, float]:
    """Return each layer's fraction ``f_l`` of ``max_grad_norm``, with ``sum(f_l ** 2) == 1``.

    ``"dimension"`` takes ``f_l ** 2`` proportional to ``sqrt(d_l)`` for a layer of ``d_l``
    parameters. It minimises the total noise-to-signal power ``sum(d_l / Delta_l ** 2)`` under
    ``sum(Delta_l ** 2) == Delta ** 2``: the Lagrangian condition is ``d_l / Delta_l ** 4 = const``.

    Args:
        sizes: the number of trainable parameters of each layer, by dotted module name.
        allocation: ``"equal"``, ``"dimension"``, or each layer's share of ``max_grad_norm ** 2``.

    Raises:
        CoverageError: the mapping leaves a layer out, or names one that does not exist.

    Example:
        >>> layer_fractions({"a": 1, "b": 16}, "equal")["a"] ** 2
        0.5000000000000001
        >>> round(layer_fractions({"a": 1, "b": 16}, "dimension")["b"] ** 2, 3)
        0.8
    """
    shares = _shares(sizes, allocation)
    largest = max(shares.values())
    total = math.fsum(share / largest for share in shares.values())
    return {name: math.sqrt(share / largest / total) for name, share in shares.items()}


def norm_of_each_use(norm: float, uses: int) -> float:
    """Return the norm that each use of a layer clips to: ``Delta_l / K`` for ``K`` uses.

    An example's gradient is the sum over the uses. By the triangle inequality its norm is at most
    ``K * Delta_l / K``, even if all uses point the same way.
    """
    return norm / uses


def noise_weights(
    sizes: Mapping[str, int], layer_noise: str | Mapping[str, float]
) -> dict[str, float] | None:
    """Return ``w_l``, how much harm a layer's noise does: its parameters times the user's factor.

    Args:
        sizes: the number of trainable parameters of each layer, by dotted module name.
        layer_noise: ``"equal"``, ``"dimension"``, or factors by name, 1 for layers without one.

    Returns:
        ``None`` for ``"equal"``.

    Raises:
        CoverageError: the mapping names a layer that does not exist.
    """
    if layer_noise == "equal":
        return None
    factors = layer_noise if isinstance(layer_noise, Mapping) else {}
    unknown = sorted(set(factors) - set(sizes))
    if unknown:
        raise CoverageError(
            f"layer_noise names layers that the model does not train: {', '.join(unknown)}. It has "
            f"{', '.join(sizes)}."
        )
    return {name: size * factors.get(name, 1.0) for name, size in sizes.items()}


def _shares(sizes: Mapping[str, int], allocation: str | Mapping[str, float]) -> dict[str, float]:
    if allocation == "equal":
        return dict.fromkeys(sizes, 1.0)
    if allocation == "dimension":
        return {name: math.sqrt(size) for name, size in sizes.items()}
    assert isinstance(allocation, Mapping)
    unknown = sorted(set(allocation) - set(sizes))
    missing = sorted(set(sizes) - set(allocation))
    if unknown or missing:
        raise CoverageError(
            "allocation does not match the model's trainable layers"
            + (f"; no such layer: {', '.join(unknown)}" if unknown else "")
            + (f"; no share for: {', '.join(missing)}" if missing else "")
            + f". Give a share to each of: {', '.join(sizes)}."
        )
    return {name: float(allocation[name]) for name in sizes}
