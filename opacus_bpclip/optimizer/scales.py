"""The noise's standard deviation for each parameter and for the counts of examples.

One step releases the layers' sums, of sensitivities ``Delta_l``, and ``L`` counts, to each of which
an example adds at most 1/2. Each divided by its noise, they are one vector. With the noise ``s_l``
of a layer and ``s_c`` of a count, one example moves it by at most the root of

    sum(Delta_l ** 2 / s_l ** 2) + L / (4 * s_c ** 2).

That is ``1 / noise_multiplier``, so that the step is one Gaussian mechanism of this noise
multiplier. Proof: ``docs/guarantee.md``, "Noise scaled by layer" and "Moving thresholds".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from opacus_bpclip.clipping.sensitivities import Sensitivities
from opacus_bpclip.config import AdaptiveThreshold


class Scales(NamedTuple):
    """The noise's standard deviations.

    Attributes:
        layers: by name, the noise of each number of a layer's sum.
        counts: the noise of each count of examples; 0 without counts.
    """

    layers: dict[str, float]
    counts: float


def scales(
    noise_multiplier: float,
    sensitivities: Mapping[str, float],
    *,
    weights: Mapping[str, float] | None = None,
    counts: int = 0,
    count_noise: float = 0.0,
) -> Scales:
    """Return the noise's standard deviations.

    Args:
        noise_multiplier: what the accountant counts the step as.
        sensitivities: ``Delta_l`` by name; their squares sum to ``max_grad_norm ** 2``.
        weights: ``w_l`` by name: the noise minimises ``sum(w_l * s_l ** 2)``. ``None`` for the same
            noise in all layers.
        counts: the number ``L`` of counts.
        count_noise: the noise of the counts over ``noise_multiplier * sqrt(L)``, more than 1/2.

    Examples:
        >>> scales(2.0, {"a": 3.0, "b": 4.0}).layers
        {'a': 10.0, 'b': 10.0}
        >>> found = scales(1.0, {"a": 1.0}, counts=4, count_noise=5.0)
        >>> round(found.layers["a"], 5), found.counts
        (1.00504, 10.0)
    """
    count = noise_multiplier * count_noise * math.sqrt(counts)
    # The counts take a part of 1 / noise_multiplier ** 2; the gradient has the rest.
    sigma = noise_multiplier / math.sqrt(1 - 1 / (4 * count_noise**2) if counts else 1.0)
    if weights is None:
        norm = math.hypot(*sensitivities.values())
        return Scales(dict.fromkeys(sensitivities, sigma * norm), count)
    # Minimal where w_l * s_l ** 4 / Delta_l ** 2 is the same for all layers (Lagrange).
    roots = {name: math.sqrt(weights[name]) for name in sensitivities}
    total = math.fsum(delta * roots[name] for name, delta in sensitivities.items())
    return Scales(
        {n: sigma * math.sqrt(delta * total / roots[n]) for n, delta in sensitivities.items()},
        count,
    )


def noise_of(
    own: Sensitivities, noise_multiplier: float, max_grad_norm: float
) -> dict[Tensor, float]:
    """Return the noise's standard deviation for each trainable parameter and each count.

    Args:
        own: the sensitivities of the layers.
        noise_multiplier: what the accountant counts the step as.
        max_grad_norm: the sensitivity of all layers together.
    """
    adaptive = own.policy if isinstance(own.policy, AdaptiveThreshold) else None
    scaled = own.noise_weights is not None
    found = scales(
        noise_multiplier,
        own.by_layer if scaled else {"": max_grad_norm},
        weights=own.noise_weights,
        counts=len(own.counts),
        count_noise=0.0 if adaptive is None else adaptive.count_noise,
    )
    stds: dict[Tensor, float] = dict.fromkeys(own.counts.values(), found.counts)
    for name, group in own.groups.items():
        stds |= dict.fromkeys(group.parameters, found.layers[name if scaled else ""])
    return stds
