"""On every batch: each parameter's gradient is its layer's clipped one, and nothing else.

The guard watches one model in eager mode. In the forward pass it counts each layer's calls and
checks the batch dimension. In the backward pass it follows the gradient itself: the tensor that
arrives at a parameter must be *the* tensor that the layer's own node produced. Had anything else
contributed (a second use, a penalty in the loss, ``F.linear(x, layer.weight)``), autograd would
have summed into another tensor. The sum is taken at that moment, so that nothing done to ``p.grad``
afterwards can change it.

Inside a graph traced by ``torch.compile`` none of this runs; there, a parameter is let through
only once an eager batch has vouched for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from opacus_bpclip.coverage import (
    TRAINABLE_DTYPES,
    Layer,
    batch_normalization_problem,
    batch_normalizations,
    edited_problem,
    mixes_examples,
)
from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.provenance import WatchedParameter, follow, parameter_edges, watch_edge
from opacus_bpclip.rules import Inputs

Versions = tuple[int, ...]


class GradientGuard:
    """Watch the trainable layers of one model.

    Args:
        model: the root module.
        layers: its trainable layers.

    Attributes:
        violation: why the gradients at hand must not be used, or ``None``.
        accumulation_allowed: whether several backward passes may add up before one step.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        self._model = model
        self.violation: str | None = None
        self.accumulation_allowed = True
        self._compiled = False
        self._in_forward = False
        self._batch_size = 0
        self._forward = 0  # the number of the latest forward pass
        self._sources: set[int] = set()  # numbers of those that the gradients at hand came from
        self._calls: dict[str, int] = {}  # of each layer in the latest forward pass
        self._watched: dict[Tensor, WatchedParameter] = {}
        for layer in layers:
            for name, parameter in layer.module.named_parameters(recurse=False):
                if parameter in self._watched:
                    self._watched[parameter].uses += layer.uses
                elif parameter.requires_grad:
                    self._watched[parameter] = WatchedParameter(
                        f"{layer.name}.{name}", parameter, layer.uses, self._judge, self.fail
                    )
        self._parameters = dict(model.named_parameters())
        self._versions: list[int] = []
        self._frozen = [
            (name, parameter)
            for name, parameter in self._parameters.items()
            if parameter not in self._watched
        ]

    def remove(self) -> None:
        """Stop watching."""
        for watched in self._watched.values():
            watched.remove()

    def clear(self) -> None:
        """Forget the gradients at hand: they have been used or thrown away."""
        self.violation = None
        self._sources.clear()
        for watched in self._watched.values():
            watched.clear()

    def finish(self) -> None:
        """Forget the gradients at hand, and the forward pass that they came from."""
        self.clear()
        self._compiled = False

    @property
    def pending(self) -> bool:
        """Return whether clipped gradients wait for their noise."""
        sums = (getattr(parameter, "summed_grad", None) for parameter in self._watched)
        return self.passes > 0 or any(
            summed is not None and not hasattr(summed, "_processed") for summed in sums
        )

    @property
    def passes(self) -> int:
        """Return how many backward passes the gradients at hand add up."""
        return max((watched.passes for watched in self._watched.values()), default=0)

    # Forward

    def enter_forward(self, batch_size: int) -> None:
        """Begin a forward pass of the root over ``batch_size`` examples."""
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                self.fail(
                    f"{name} was frozen when make_private was called and has been unfrozen since: "
                    "nothing clips its gradient. Unfreeze it first, then call make_private again."
                )
        # Looked up anew: a module may have been put in the place of another.
        for name, norm in batch_normalizations(self._model).items():
            if mixes_examples(norm):
                self.fail(batch_normalization_problem(name))
        self._compiled = False
        self._calls.clear()
        self._forward += 1
        self._in_forward = True
        self._batch_size = batch_size
        self._versions = [parameter._version for parameter in self._parameters.values()]

    def leave_forward(self) -> None:
        """End a forward pass of the root."""
        self._in_forward = False
        versions, self._versions = self._versions, []
        for (name, parameter), version in zip(self._parameters.items(), versions, strict=False):
            if parameter._version != version:
                self.fail(edited_problem(name))

    def enter_layer(self, layer: Layer) -> bool:
        """Count one use of a layer; return whether it is one to follow through the backward pass.

        A use inside a backward pass is activation checkpointing's second run of one that was
        checked and counted the first time.
        """
        calls = self._calls.get(layer.name, 0)
        if _in_backward():
            if not calls:
                self.fail(
                    f"{layer.name} runs for the first time inside the backward pass, where its "
                    "uses cannot be counted. Use checkpoint(..., use_reentrant=False)."
                )
            return False
        if not self._in_forward:
            compiled = layer.recurrence is not None
            self.fail(
                f"{layer.name} was called outside its model's forward pass, where nothing "
                "ties its rows to the examples of the batch. Call the whole model, "
                + ("without torch.compile (it cannot trace recurrent networks), " * compiled)
                + "and have its forward return whatever the loss needs."
            )
        if calls >= layer.uses:
            times = "once" if layer.uses == 1 else f"{layer.uses} times"
            self.fail(
                f"{layer.name} is used more than {times} in a forward pass: each use adds to one "
                f"example's contribution, and the bound counts {layer.uses}. Give each use its own "
                f"layer, or declare how many there are: BackpropClipping(uses={{{layer.name!r}: "
                "...})."
            )
        self._calls[layer.name] = calls + 1
        if layer.is_patched:
            self.fail(
                f"{layer.name} was changed after make_private (its forward was replaced, an option "
                "was set, or a parametrization was added): its rule no longer describes it. Change "
                "the model first, then call make_private."
            )
        if torch.nn.modules.module._global_forward_hooks:
            self.fail(
                "A forward hook on every module (register_module_forward_hook) may change what a "
                f"layer such as {layer.name} returns before it is clipped. Remove the hook."
            )
        saving = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if saving is not None and not _of_torch(saving[0]):
            self.fail(
                f"{layer.name} runs under hooks on saved tensors (saved_tensors_hooks) that are "
                "not torch's own: if they change a number, as lossy compression of activations "
                "does, the layer's gradient is not the one that is bounded. Use save_on_cpu or "
                "checkpoint(..., use_reentrant=False)."
            )
        return True

    def check_batch(self, layer: Layer, inputs: Inputs) -> None:
        """Check that the inputs of a layer's call hold the examples of the batch."""
        first = inputs[0]
        assert first is not None
        smallest, largest = layer.rule.expected_dims()
        if first.dim() < smallest or (largest is not None and first.dim() > largest):
            self.fail(
                f"{layer.name} got an input of shape {self._passed_shape(layer, first)}; with the "
                f"batch first its rule needs {smallest}{' or more' if largest is None else ''} "
                "axes. Add the batch axis."
            )
        for size in layer.rule.batch_sizes(inputs):
            if size != self._batch_size:
                shape = self._passed_shape(layer, first)
                self.check_examples(layer.name, shape, size, layer.arguments.batch_axis)

    @staticmethod
    def _passed_shape(layer: Layer, x: Tensor) -> tuple[int, ...]:
        return tuple(layer.arguments.as_passed(x).shape)

    def check_examples(self, name: str, shape: tuple[int, ...], size: int, axis: int) -> None:
        """Check that a module's input of this shape holds one row for each example."""
        if size != self._batch_size:
            order = ("first", "second")[axis]
            self.fail(
                f"{name} got an input of shape {shape} in a batch of {self._batch_size} examples: "
                f"its {order} axis must be the batch, or one factor would scale a mix of examples. "
                "Expand inputs that are shared by the batch (such as position embeddings) and keep "
                f"the batch axis {order}."
            )

    def check_parameters(self, layer: Layer) -> None:
        """Check that a layer uses the very parameters that are watched, and not a multiple."""
        name = layer.replaced_parameter()
        if name is not None:
            self.fail(
                f"{layer.name}.{name} is not the parameter that make_private saw: it was replaced, "
                "it is computed from another (functional_call, spectral_norm), or the module's "
                "forward calls the module. Change the model first, then call make_private."
            )

    def check_inputs(self, layer: Layer, clipped: Inputs, versions: Versions, used: Inputs) -> None:
        """Check that the layer used its inputs as they were clipped and measured."""
        for one, version, other in zip(clipped, versions, used, strict=True):
            # A full backward hook hands on another view of the same numbers.
            if one is not None and (other is None or not _same(one, version, other)):
                self.fail(
                    f"Another forward pre-hook of {layer.name} changed the input after it was "
                    "clipped and measured. Register it before make_private."
                )

    def require_first_hook(self, layer: Layer, key: int) -> None:
        """Check that the forward hook with this key is the first of its layer's."""
        if next(iter(layer.module._forward_hooks)) != key:
            self.fail(
                f"Another forward hook of {layer.name} was put before the one that clips its "
                "upstream gradient. Register it without prepend=True."
            )

    def check_dtype(self, layer: Layer, y: Tensor) -> None:
        """Check that a layer computes in the dtype of its parameters."""
        for parameter in layer.parameters:
            if y.dtype != parameter.dtype:
                self.fail(
                    f"{layer.name} computes in {y.dtype} with parameters in {parameter.dtype} "
                    "(autocast?): its gradient, summed over the batch, would be rounded by more "
                    "than one example's contribution. Run the model without autocast."
                )

    def follow(self, layer: Layer, y: Tensor, inputs: Inputs) -> None:
        """Follow the gradients that this call of the layer will send to its parameters.

        Args:
            layer: the layer.
            y: what it made.
            inputs: of what; the graph behind them is somebody else's.
        """
        self.check_parameters(layer)
        self.check_dtype(layer, y)
        stop = {x.grad_fn for x in inputs if x is not None}
        own = set(layer.parameters)
        for node, edges in parameter_edges(y, stop):
            # Another layer's parameter, used in here, is not what this layer's rule bounds.
            watched = [(index, self._watched[leaf]) for index, leaf in edges if leaf in own]
            if watched:
                follow(node, watched, partial(self._sources.add, self._forward), self.fail)

    def join(self, layer: Layer, clipped: Tensor, y: Tensor) -> None:
        """Check, when the time comes, that the layer gets the very gradient that was clipped.

        Args:
            layer: the layer.
            clipped: what its clip made of ``y``.
            y: what the layer made.
        """

        def changed() -> None:
            self.fail(
                f"{layer.name} got another gradient than the one that was clipped for it: a "
                "backward hook changed it (register_backward_hook, or a hook on grad_fn), or the "
                "layer's output went around the clip. Use register_full_backward_hook, which sees "
                "gradients before they are clipped."
            )

        watch_edge(clipped, y, changed)

    # Backward

    def note_compiled(self) -> None:
        """Note that part of the model runs as a compiled graph, unseen by the guard."""
        self._compiled = True

    def fail(self, reason: str) -> NoReturn:
        """Make the gradients at hand unusable, and raise.

        Raises:
            PrivacyViolationError: always.
        """
        self.violation = reason
        raise PrivacyViolationError(reason)

    def _judge(self, watched: WatchedParameter, gradient: Tensor) -> None:
        """Check a gradient that is about to reach its parameter."""
        stale = watched.parameter.grad
        if gradient.dtype not in TRAINABLE_DTYPES:
            self.fail(
                f"{watched.name} was turned to {gradient.dtype} after make_private: the sum over "
                "the batch would be rounded by more than one example's contribution. Keep "
                "trainable parameters in torch.float32."
            )
        if not watched.sent and not (self._compiled and watched.vouched):
            self.fail(
                f"{watched.name} got a gradient that did not come from its layer's call. "
                + (
                    "Run the first batch before torch.compile, so that it can be checked."
                    if self._compiled
                    else "Use the parameter through its layer only, not directly "
                    "(F.linear(x, layer.weight), a penalty on the weights in the loss); attach "
                    "privacy before torch.compile."
                )
            )
        if watched.sent and not watched.is_sum_of_sent(gradient):
            self.fail(
                f"{watched.name} got gradient from outside its layer's call, and nothing bounds "
                "it. Use the parameter through its layer only, not directly "
                "(F.linear(x, layer.weight), a penalty on the weights in the loss), and without "
                "hooks that change gradients."
            )
        if (watched.passes or len(self._sources) > 1) and not self.accumulation_allowed:
            self.fail(
                "Poisson sampling is not compatible with grad accumulation: two batches may share "
                "an example. Call optimizer.step() and zero_grad() after every backward pass, or "
                "use BatchMemoryManager."
            )
        if not watched.passes and stale is not None and bool(stale.any()):
            self.fail(
                f"{watched.name}.grad was not empty before the backward pass. Call "
                "optimizer.zero_grad() after every step, and leave p.grad alone."
            )
        watched.vouched = True

    def watches(self, parameter: nn.Parameter) -> bool:
        """Return whether what arrives at a parameter is checked and collected."""
        return parameter in self._watched

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the parameter's sum of contributions since the last step, ``None`` without any."""
        return self._watched[parameter].take()


def versions(inputs: Inputs) -> Versions:
    """Return the state that `GradientGuard.check_inputs` compares with."""
    return tuple(0 if x is None else x._version for x in inputs)


def _same(one: Tensor, version: int, other: Tensor) -> bool:
    if one is other:
        return other._version == version
    alike = other.data_ptr() == one.data_ptr() and other.shape == one.shape
    return alike and other.stride() == one.stride() and other._version == version


def _of_torch(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
