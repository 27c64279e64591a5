"""Find the rule for a function call that computes what a known layer computes.

This saves time and memory: ``F.linear(x, embedding.weight)`` is a linear layer without a module,
and the rule measures its gradient without building it for each example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.places import Place
from opacus_bpclip.model.plan import Template
from opacus_bpclip.rules import Prepared, Rule, registered_kind


class RuledCall(NamedTuple):
    """A call that a rule describes.

    Attributes:
        rule: the rule.
        input: the index of the argument that holds the examples.
        unfolded: whether the rule takes ``[B, ...]`` where `Place.rows` has ``[B, 1, ...]``.
    """

    rule: Rule
    input: int
    unfolded: bool

    def prepared(self, arguments: Sequence[Any], template: Template, examples: int) -> Prepared:
        """Return the input, prepared by the rule."""
        place = template.arguments[self.input]
        assert place is not None
        x = self.rows(place.rows(arguments[self.input].detach(), examples))
        with torch.no_grad():
            return self.rule.prepare((x,), None)

    def rows(self, x: Tensor) -> Tensor:
        """View the examples' rows in the shape that the rule takes."""
        return x.squeeze(1) if self.unfolded else x


_Arguments = Mapping[str, Any]


def _linear(given: _Arguments) -> nn.Module:
    outputs, inputs = given["weight"].shape
    return nn.Linear(inputs, outputs, bias=given.get("bias") is not None, device="meta")


def _embedding(given: _Arguments) -> nn.Module:
    count, width = given["weight"].shape
    return nn.Embedding(
        count,
        width,
        given.get("padding_idx"),
        given.get("max_norm"),
        scale_grad_by_freq=given.get("scale_grad_by_freq", False),
        sparse=given.get("sparse", False),
        device="meta",
    )


def _convolution(kind: type[nn.Conv1d | nn.Conv2d | nn.Conv3d]) -> Callable[..., nn.Module]:
    def make(given: _Arguments) -> nn.Module:
        weight, groups = given["weight"], given.get("groups", 1)
        return kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=given.get("stride", 1),
            padding=given.get("padding", 0),
            dilation=given.get("dilation", 1),
            groups=groups,
            bias=given.get("bias") is not None,
            device="meta",
        )

    return make


_NAMES_OF_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NAMES_OF_EMBEDDING = (
    "input",
    "weight",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)

# By the function's name: the names of its arguments, a constructor of the layer that computes the
# same, and how many axes must follow the batch axis. `None`: the batch must be the first axis.
_LAYERS: dict[str, tuple[tuple[str, ...], Callable[[_Arguments], nn.Module], int | None]] = {
    "linear": (("input", "weight", "bias"), _linear, 1),
    "embedding": (_NAMES_OF_EMBEDDING, _embedding, 0),
    "conv1d": (_NAMES_OF_CONVOLUTION, _convolution(nn.Conv1d), None),
    "conv2d": (_NAMES_OF_CONVOLUTION, _convolution(nn.Conv2d), None),
    "conv3d": (_NAMES_OF_CONVOLUTION, _convolution(nn.Conv3d), None),
}


def rule_of_call(
    call: FunctionCall, template: Template, upstream: Sequence[Tensor]
) -> RuledCall | None:
    """Return the rule for a call whose weight and bias are parameters themselves, or ``None``.

    Args:
        call: the call.
        template: the places of the batch in its arguments and results.
        upstream: the gradients of the results, in the shape of `Place.rows`.
    """
    names, make, behind = _LAYERS.get(call.name, ((), None, None))
    if make is None or any(made.value.grad_fn is not None for made in call.made.values()):
        return None
    indices, spec = list(range(len(call.leaves))), call.spec
    args, kwargs = pytree.tree_unflatten(indices, spec)
    where = {**dict(zip(names, args, strict=False)), **kwargs}
    given = pytree.tree_map(lambda index: call.leaves[index], where)
    trained = {name for name in ("weight", "bias") if where.get(name) in call.made}
    place, index = template.arguments[where["input"]], where["input"]
    if (
        given["weight"].dim() < 2
        or len(trained) != len(call.made)
        or place is None
        or template.outputs[0] is None
    ):
        return None
    if behind is None:
        if (place, template.outputs[0]) != (Place(0), Place(0)):
            return None
    elif not _is_before(place, given["input"].dim(), behind) or not _is_before(
        template.outputs[0], upstream[0].dim() - 1, 1
    ):
        return None
    module = make(given)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    registered = registered_kind(type(module))
    assert registered is not None
    try:
        return RuledCall(registered[1].from_module(module), index, behind is None)
    except CoverageError:
        return None


def _is_before(place: Place, dims: int, behind: int) -> bool:
    return place.axis < dims - behind
