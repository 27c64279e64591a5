"""A cheap check whether a model uses trainable parameters outside layers with a rule.

Most models do not, and then need no trial runs that find where functions have the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from torch import Tensor
from torch.utils import _pytree as pytree

from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.functions import ParameterFunctions
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.recorder import Trials
from opacus_bpclip.probe.shapes import LayerCall, watch_layers


class _Touched(ParameterFunctions):
    """Records whether any function was called on a trainable parameter, and runs it unchanged."""

    touched = False

    def note_arguments(
        self, without_examples: Iterable[Tensor], examples: Iterable[Tensor] = ()
    ) -> None:
        """Do nothing: the other arguments of such a call do not matter here."""

    def called(self, call: FunctionCall) -> object:
        """Record that there was a call, and run it."""
        self.touched = True
        args, kwargs = pytree.tree_unflatten(call.leaves, call.spec)
        return call.func(*args, **kwargs)


def first_look(trials: Trials, batch: Batch) -> tuple[bool, list[LayerCall]]:
    """Run the model; return whether a function used a trainable parameter, and layers' calls."""
    mode, calls = _Touched(trials.parameters()), list[LayerCall]()
    with ExitStack() as stack:
        for handle in watch_layers(trials.modules(), calls):
            stack.callback(handle.remove)
        trials.run_with(mode, batch, ())
    return mode.touched, calls
