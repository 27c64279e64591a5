"""Find the layers of recurrent networks, whose rows are the same examples at every time step.

Opacus's `DPRNN`, `DPLSTM` and `DPGRU`, and this package's replacements of PyTorch's networks, call
the layers of their cells once per time step. Row ``i`` of every call belongs to the same example,
also in packed sequences, where later time steps have only the first rows. Networks that override
the code which guarantees this are not treated as recurrent.
"""

from __future__ import annotations

from opacus.layers.dp_rnn import DPGRUCell, DPLSTMCell, DPRNNBase, DPRNNCell, RNNLinear
from opacus.layers.param_rename import RenameParamsMixin
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import TypeIs

from opacus_bpclip.replacements.recurrent import Recurrent

_CELL_FORWARDS = {cell.forward for cell in (DPRNNCell, DPLSTMCell, DPGRUCell)}
# The methods that keep the rows aligned, by the class that is known to do so.
_NETWORK_METHODS: dict[type[DPRNNBase], tuple[str, ...]] = {
    DPRNNBase: ("forward", "forward_layer", "iterate_layers"),
    Recurrent: ("forward", "_run"),
}


def recurrent_linears(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the linear layers of the model's recurrent networks, each with its network.

    Networks for which `aligns_rows` is false are left out.
    """
    return {
        linear: network
        for network in model.modules()
        if isinstance(network, DPRNNBase) and aligns_rows(network)
        for linear in network.modules()
        if isinstance(linear, RNNLinear)
    }


def renamed_parameters(module: nn.Module) -> set[str]:
    """Return the names of a module's parameters that belong to its submodules, too."""
    if not isinstance(module, RenameParamsMixin):
        return set()
    below = {parameter for child in module.children() for parameter in child.parameters()}
    own = module._parameters.items()
    return {name for name, parameter in own if parameter in below}


def aligns_rows(network: DPRNNBase) -> bool:
    """Return whether a network runs code that is known to keep each example in one row."""
    own = any(
        all(
            getattr(type(network), method, None) is getattr(kind, method)
            and method not in vars(network)
            for method in methods
        )
        for kind, methods in _NETWORK_METHODS.items()
    )
    cells = (
        type(cell).forward in _CELL_FORWARDS and "forward" not in vars(cell)
        for cell in network.cells
    )
    return own and all(cells)


def is_packed(value: object) -> TypeIs[PackedSequence]:
    """Return whether a value is a ``PackedSequence``."""
    return isinstance(value, PackedSequence)
