"""Rehearsals: passes in eager mode, on made-up examples, that check what compiled graphs compute.

A rehearsal calls the model in the form in which the compiled model was called, with its clipping
hooks. It leaves no trace: no sums are collected, the model's buffers and attributes and all random
number generators are restored, and no parameter gets a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.guard.forms import Form, Unchecked
from opacus_bpclip.guard.gradient_checks import (
    functions_in_a_graph,
    unconfirmed_gradient,
    unrehearsed,
)
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.guard.passes import BackwardPasses
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.copies import device_of
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.probe.problems import first_line
from opacus_bpclip.probe.randomness import repeatable
from opacus_bpclip.probe.substitutes import Substitutes

# The guard's state of the current batch.
_OF_BATCH = (
    "violation",
    "refused",
    "passes",
    "ran_compiled",
    "rehearsing",
    "_in_forward",
    "_batch_size",
    "_calls",
)


def check_graphs(model: nn.Module, guard: GradientGuard) -> None:
    """Check the gradients from compiled graphs, by rehearsals where eager mode has not yet.

    Args:
        model: the model, with its clipping hooks.
        guard: the model's guard.

    Raises:
        PrivacyViolationError: a check has failed in a form in which the model was called, or the
            form could not be rehearsed.
    """
    for form in guard.forms.unchecked(guard.arrived):
        problem = _rehearsed(model, guard, form)
        guard.require(problem)
        guard.forms.settle(form.form)
    for watched in guard.arrived:
        # The rehearsal may have added to these.
        if watched.parameter in guard.by_functions:
            guard.fail(functions_in_a_graph(watched))
        if not watched.confirmed:
            guard.fail(unconfirmed_gradient(watched))


def _rehearsed(model: nn.Module, guard: GradientGuard, unchecked: Unchecked) -> str | None:
    """Rehearse one form; return what is wrong with it."""
    if unchecked.example is None:
        reason = "none could be made up for its arguments"
    else:
        try:
            with collecting_nothing(guard):
                _run(model, guard, unchecked.form, unchecked.example)
        except PrivacyViolationError as error:
            return str(error)
        except Exception as error:  # whatever the model's own code raises
            reason = first_line(error)
        else:
            return None
    # An eager batch of the user's is as good as a rehearsal; the parameters that it did not reach
    # are checked by `check_graphs`.
    return None if unchecked.collected else unrehearsed(reason)


@contextmanager
def collecting_nothing(guard: GradientGuard) -> Iterator[None]:
    """Let the guard check a forward and backward pass as usual, and collect none of its sums."""
    of_batch = {name: vars(guard)[name] for name in _OF_BATCH}
    watch = None if guard.loss is None else dict(vars(guard.loss))
    guard._calls, guard.passes, guard.rehearsing = {}, BackwardPasses(), True
    try:
        yield
    finally:
        vars(guard).update(of_batch)
        if guard.loss is not None and watch is not None:
            vars(guard.loss).update(watch)


def _run(model: nn.Module, guard: GradientGuard, form: Form, batch: Batch) -> None:
    """Run one forward and backward pass, to every output that has a gradient."""
    with ExitStack() as stack:
        stack.enter_context(repeatable(device_of(model)))
        stack.enter_context(Substitutes(model, _substitute))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        with ExitStack() as inside:
            for kind, dtype in form.autocast:
                inside.enter_context(torch.autocast(kind, dtype))
            if model.training != form.training:
                model.train(form.training)
            output = model(*batch.args, **batch.kwargs)
        if guard.loss is not None:
            # There is no criterion in a rehearsal: its gradients are made below.
            guard.loss.note_traced()
        made = [x for x in batch_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.backward(made, [torch.randn_like(x) for x in made])


def _substitute(tensor: Tensor) -> Tensor:
    """Return a tensor's substitute. Parameters are not replaced, since the guard watches them."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
