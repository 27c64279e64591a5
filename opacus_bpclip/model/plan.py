"""What trial runs have shown of the functions that a model calls on parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from opacus_bpclip.model.places import Place

# Files and lines, the innermost first.
Site = tuple[tuple[str, int], ...]

# In closed form; by `torch.func.vmap` over the function on one example; by autograd on one example
# after the other; or, where the function draws numbers, by autograd on the call that was made.
Method = Literal["known", "vmap", "loop", "graph"]


class Template(NamedTuple):
    """How one call of a function takes up the batch.

    Attributes:
        arguments: for each of its flattened arguments, where the batch is: a `Place` in a tensor,
            also for a number that counts the batch's rows (``expand(B, -1)``), else ``None``.
        outputs: the same for each of its flattened results.
        method: how the examples' gradients are made.
        batched: whether those of what was computed from parameters are sent back to the parameters
            together, or one after the other.
    """

    arguments: tuple[Place | None, ...]
    outputs: tuple[Place | None, ...]
    method: Method = "vmap"
    batched: bool = True

    def placed(self, results: Sequence[Any]) -> list[tuple[Any, Place]]:
        """Return the results that hold the batch, each with where it is."""
        pairs = zip(results, self.outputs, strict=True)
        return [(x, place) for x, place in pairs if place is not None]

    def given(self, arguments: Sequence[Any], examples: int) -> list[Tensor]:
        """Return the rows of the arguments that hold the batch, without their graph."""
        return [
            place.rows(x.detach(), examples)
            for x, place in zip(arguments, self.arguments, strict=True)
            if place is not None and isinstance(x, Tensor)
        ]

    @property
    def meets(self) -> bool:
        """Return whether the function meets examples, or makes one copy for each."""
        return any(place is not None for place in (*self.arguments, *self.outputs))


class CallKey(NamedTuple):
    """What calls have in common that take up the batch alike.

    Attributes:
        name: of the function.
        parameters: the names of those behind its arguments.
        made: the indices of the arguments that were computed from parameters alone.
        kinds: what its flattened arguments are.
        site: the files and the lines that call it, up to the module's forward.
    """

    name: str
    parameters: frozenset[str]
    made: tuple[int, ...]
    kinds: tuple[object, ...]
    site: Site


@dataclass(frozen=True)
class Plan:
    """What trial runs have shown of the functions that a model calls on parameters.

    Attributes:
        templates: by `FunctionCall.key`, in the order of the calls; one if they are all alike.
        layers: by name, those whose parameters functions meet examples with.
        passed_by: those of them whose own rule does not hold for how they are called: examples are
            on another axis, folded with others, or the input is the same for every example.
    """

    templates: Mapping[CallKey, tuple[Template, ...]]
    layers: frozenset[str] = frozenset()
    passed_by: frozenset[str] = frozenset()

    @property
    def is_folded(self) -> bool:
        """Return whether some tensor holds several entries of each example: as lengths have it."""
        return any(
            place is not None and place.entries > 1
            for templates in self.templates.values()
            for template in templates
            for place in (*template.arguments, *template.outputs)
        )

    def told(self, layer: str) -> tuple[str, ...]:
        """Return which functions meet examples with a layer's parameters, and by which method."""
        found = (
            f"{key.name} ({template.method})"
            for key, templates in self.templates.items()
            for template in templates
            if template.meets and any(n.rpartition(".")[0] == layer for n in key.parameters)
        )
        return tuple(sorted(set(found)))

    def joined(self, other: Plan) -> Plan:
        """Return what holds for passes of both kinds.

        Calls that take up the batch in one way here and in another there are left out of it.
        """
        templates = {**other.templates, **self.templates}
        for key, own in self.templates.items():
            if other.templates.get(key, own) != own:
                del templates[key]
        return Plan(templates, self.layers | other.layers, self.passed_by | other.passed_by)
