"""Whether every layer has its rows in the batch's order.

With a joint budget one factor for each example scales its gradients of all layers, so row ``i`` of
every layer's output must be example ``i``. A model that sorts its examples between two layers, and
restores their order at the end, couples no examples. It is found here: in a smaller batch, or with
other companions, some rows of a layer belong to other examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opacus_bpclip.model.layer import Layer
from opacus_bpclip.probe.comparison import Companions, Layout, close, differ
from opacus_bpclip.probe.recording import Recording

# The axes of a module's output that may be the batch axis, by the module's name.
Rows = Mapping[str, tuple[int, ...]]


def rows_of_layers(model: nn.Module, layers: Iterable[Layer]) -> Rows:
    """Return the batch axes of the outputs of trainable layers.

    For layers inside a recurrent network, the network's own output counts: the network tells them
    the order of the rows, also of sorted packed sequences.
    """
    names = {module: name or "(root)" for name, module in model.named_modules()}
    found: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        network = layer.recurrence
        if network is None:
            found[layer.name] = (layer.arguments.batch_axis,)
        else:
            # Packed sequences are recorded with the batch first, whatever the network says.
            found[names[network]] = (0,) if network.batch_first else (0, 1)
    return found


def out_of_order(
    base: Recording, run: Recording, rows: Rows, companions: Companions, tolerance: float
) -> str | None:
    """Return the first layer whose rows are not at the examples' places in both batches."""
    for call, other in base.matched(run):
        axes = rows.get(call.name)
        if axes and call.outputs and other.outputs:
            x, y = call.outputs[0], other.outputs[0]
            where = _places(x, y, axes, companions)
            if where and differ(x, y, where, companions, tolerance):
                return call.name
    return None


def constant_layers(base: Recording, rows: Rows, size: int) -> Rows:
    """Return the layers whose output is the same for every example, such as position embeddings.

    The order of their rows can be seen only from what the model computes with them.
    """
    found = {}
    for call in base.calls:
        for axis in rows.get(call.name, ()):
            x = call.outputs[0] if call.outputs else torch.zeros(0)
            if x.dim() > axis and x.shape[axis] == size and size > 1:
                first = x.narrow(axis, 0, 1)
                if close(x, first.expand_as(x), 0.0):
                    found[call.name] = (axis,)
    return found


@contextmanager
def disturbed(model: nn.Module, rows: Rows, kept: Iterable[int], size: int) -> Iterator[None]:
    """Add noise to layers' outputs for all examples except those kept.

    Args:
        model: the model.
        rows: the layers' batch axes, by name.
        kept: the examples that stay as they are.
        size: the batch's size.
    """
    others = torch.tensor([row not in set(kept) for row in range(size)])

    def watch(module: nn.Module, axis: int) -> torch.utils.hooks.RemovableHandle:
        def disturb(_: nn.Module, args: object, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor) or output.dim() <= axis or output.shape[axis] != size:
                return output
            where = others.to(output.device).view(-1, *[1] * (output.dim() - axis - 1))
            generator = torch.Generator().manual_seed(3)
            noise = torch.randn(output.shape, generator=generator).to(output)
            return torch.where(where, output + noise, output)

        return module.register_forward_hook(disturb)

    handles = [
        watch(model if name == "(root)" else model.get_submodule(name), axes[0])
        for name, axes in rows.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _places(x: Tensor, y: Tensor, axes: Iterable[int], companions: Companions) -> list[Layout]:
    # A layer with any other number of rows is refused in training.
    return [
        Layout(axis, False)
        for axis in axes
        if x.dim() == y.dim() > axis
        and x.shape[axis] == companions.before
        and y.shape[axis] == companions.after
    ]
