"""Group layers that share parameters: they share one sensitivity.

Contributions to different parameters are orthogonal, so their squares add up. Contributions to the
same parameter may point the same way. So tied layers form one group with one ``Delta_l``, and each
use of each of these layers gets the same share of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from opacus_bpclip.model.layer import Layer


@dataclass(frozen=True)
class Group:
    """Layers that share parameters; most often a single layer.

    Attributes:
        name: the name of the first layer.
        layers: the layers, in the model's order.
    """

    name: str
    layers: tuple[Layer, ...]

    @property
    def uses(self) -> int:
        """Return the number of uses of its layers that are allowed in one forward pass."""
        return sum(layer.uses for layer in self.layers)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the trainable parameters, shared ones once."""
        own = (parameter for layer in self.layers for parameter in layer.parameters)
        return tuple(dict.fromkeys(own))

    @property
    def size(self) -> int:
        """Return the number of trainable scalars, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters)


def tied_groups(layers: Mapping[str, Layer]) -> dict[str, Group]:
    """Return the groups of layers that share parameters, by name.

    Example:
        >>> from torch import nn
        >>> from opacus_bpclip.model.coverage import trainable_layers
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(5, 2))
        >>> model[1].weight = model[0].weight
        >>> {name: group.uses for name, group in tied_groups(trainable_layers(model)).items()}
        {'0': 2, '2': 1}
    """
    groups: list[list[Layer]] = []
    for layer in layers.values():
        own = set(layer.parameters)
        tied = [group for group in groups if any(own & set(other.parameters) for other in group)]
        merged = [other for group in tied for other in group] + [layer]
        groups = [group for group in groups if group not in tied] + [merged]
    order = list(layers)
    for group in groups:
        group.sort(key=lambda layer: order.index(layer.name))
    groups.sort(key=lambda group: order.index(group[0].name))
    return {group[0].name: Group(group[0].name, tuple(group)) for group in groups}
