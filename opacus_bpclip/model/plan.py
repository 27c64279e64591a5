"""What the trial on made-up examples has found about functions that are called on parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from opacus_bpclip.model.places import Place

# Files and lines of a call, the innermost first.
Site = tuple[tuple[str, int], ...]

# How per-example gradients are computed: in closed form; by `torch.func.vmap` over a function of
# one example; by autograd, one example after the other; or, if the function draws random numbers,
# by autograd on the graph of the call itself.
Method = Literal["known", "vmap", "loop", "graph"]


class Template(NamedTuple):
    """The places of the batch in one call of a function, and how its gradients are computed.

    Attributes:
        arguments: for each flattened argument, the `Place` of the batch in it. A number that counts
            rows of the batch (``expand(B, -1)``) has a place, too. ``None`` for other arguments.
        outputs: the same for each flattened result.
        method: how the per-example gradients are computed.
        batched: whether gradients of tensors computed from parameters are propagated to the
            parameters together, or one by one.
    """

    arguments: tuple[Place | None, ...]
    outputs: tuple[Place | None, ...]
    method: Method = "vmap"
    batched: bool = True

    def placed(self, results: Sequence[Any]) -> list[tuple[Any, Place]]:
        """Return the results that hold the batch, each with its place."""
        pairs = zip(results, self.outputs, strict=True)
        return [(x, place) for x, place in pairs if place is not None]

    def given(self, arguments: Sequence[Any], examples: int) -> list[Tensor]:
        """Return the rows of the arguments that hold the batch, detached."""
        return [
            place.rows(x.detach(), examples)
            for x, place in zip(arguments, self.arguments, strict=True)
            if place is not None and isinstance(x, Tensor)
        ]

    @property
    def holds_batch(self) -> bool:
        """Return whether an argument or a result holds the batch."""
        return any(place is not None for place in (*self.arguments, *self.outputs))


class CallKey(NamedTuple):
    """The key of a call in `Plan.templates`.

    Attributes:
        name: the name of the function.
        parameters: the names of the parameters that its arguments were computed from.
        made: the indices of the arguments that were computed from parameters alone.
        kinds: the types of its flattened arguments.
        site: the files and lines of the call, up to the module's forward.
    """

    name: str
    parameters: frozenset[str]
    made: tuple[int, ...]
    kinds: tuple[object, ...]
    site: Site


@dataclass(frozen=True)
class Plan:
    """What the trial has found about the functions that a model calls on parameters.

    Attributes:
        templates: by `FunctionCall.key`, the templates in the order of the calls; a single one if
            they are all equal.
        layers: the names of the layers whose parameters are combined with examples by functions.
        passed_by: the names of those of them that have a rule which does not hold for their calls:
            the batch is on another axis or folded with others, or the input is the same for every
            example.
    """

    templates: Mapping[CallKey, tuple[Template, ...]]
    layers: frozenset[str] = frozenset()
    passed_by: frozenset[str] = frozenset()

    @property
    def is_folded(self) -> bool:
        """Return whether some tensor holds several entries of each example on the batch axis.

        Their number then depends on the lengths of the inputs.
        """
        return any(
            place is not None and place.entries > 1
            for templates in self.templates.values()
            for template in templates
            for place in (*template.arguments, *template.outputs)
        )

    def functions_of(self, layer: str) -> tuple[str, ...]:
        """Return the functions that combine a layer's parameters with examples, and the methods."""
        found = (
            f"{key.name} ({template.method})"
            for key, templates in self.templates.items()
            for template in templates
            if template.holds_batch and any(n.rpartition(".")[0] == layer for n in key.parameters)
        )
        return tuple(sorted(set(found)))

    def joined(self, other: Plan) -> Plan:
        """Return the plan for passes of both kinds.

        Calls whose templates differ between the two are left out.
        """
        templates = {**other.templates, **self.templates}
        for key, own in self.templates.items():
            if other.templates.get(key, own) != own:
                del templates[key]
        return Plan(templates, self.layers | other.layers, self.passed_by | other.passed_by)
