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
from opacus_bpclip.model.places import Place
from opacus_bpclip.probe.comparison import Companions, Layout, close, differ
from opacus_bpclip.probe.recording import Recording

# The places in a module's output that may be the batch's, by the module's name.
Rows = Mapping[str, tuple[Place, ...]]


def rows_of_layers(model: nn.Module, layers: Iterable[Layer]) -> Rows:
    """Return the places of the batch in the outputs of trainable layers.

    For layers inside a recurrent network, the network's own output counts: the network tells them
    the order of the rows, also of sorted packed sequences.
    """
    names = {module: name or "(root)" for name, module in model.named_modules()}
    found: dict[str, tuple[Place, ...]] = {}
    for layer in layers:
        network = layer.recurrence
        if network is None:
            found[layer.name] = (layer.arguments.place,)
        else:
            # Packed sequences are recorded with the batch first, whatever the network says.
            axes = (0,) if network.batch_first else (0, 1)
            found[names[network]] = tuple(map(Place, axes))
    return found


def out_of_order(
    base: Recording, run: Recording, rows: Rows, companions: Companions, tolerance: float
) -> str | None:
    """Return the first layer whose rows are not at the examples' places in both batches."""
    for call, other in base.matched(run):
        places = rows.get(call.name)
        if places and call.outputs and other.outputs:
            x, y = call.outputs[0], other.outputs[0]
            where = _layouts(x, y, places, companions)
            if where and differ(x, y, where, companions, tolerance):
                return call.name
    return None


def constant_layers(base: Recording, rows: Rows, size: int) -> Rows:
    """Return the layers whose output is the same for every example, such as position embeddings.

    The order of their rows can be seen only from what the model computes with them.
    """
    found = {}
    for call in base.calls:
        for place in rows.get(call.name, ()):
            x = call.outputs[0] if call.outputs else torch.zeros(0)
            if size > 1 and place.fits(x, size):
                own = place.rows(x, size)
                if close(own, own[:1].expand_as(own), 0.0):
                    found[call.name] = (place,)
    return found


@contextmanager
def disturbed(model: nn.Module, rows: Rows, kept: Iterable[int], size: int) -> Iterator[None]:
    """Add noise to layers' outputs for all examples except those kept.

    Args:
        model: the model.
        rows: the places of the batch in the layers' outputs, by name.
        kept: the examples that stay as they are.
        size: the batch's size.
    """
    others = torch.tensor([row not in set(kept) for row in range(size)])

    def watch(module: nn.Module, place: Place) -> torch.utils.hooks.RemovableHandle:
        def disturb(_: nn.Module, args: object, output: Tensor) -> Tensor:
            if not isinstance(output, Tensor) or not place.fits(output, size):
                return output
            entries = others.repeat_interleave(place.entries).to(output.device)
            where = entries.view(-1, *[1] * (output.dim() - place.axis - 1))
            generator = torch.Generator().manual_seed(3)
            noise = torch.randn(output.shape, generator=generator).to(output)
            return torch.where(where, output + noise, output)

        return module.register_forward_hook(disturb)

    handles = [
        watch(model if name == "(root)" else model.get_submodule(name), places[0])
        for name, places in rows.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layouts(x: Tensor, y: Tensor, places: Iterable[Place], companions: Companions) -> list[Layout]:
    # A layer with any other number of rows is refused in training.
    return [
        Layout(place.axis, place.inner)
        for place in places
        if x.dim() == y.dim()
        and place.fits(x, companions.before)
        and place.fits(y, companions.after)
    ]
