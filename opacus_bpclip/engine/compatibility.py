"""Whether a model can be trained within the guarantee, before anything is attached to it."""

from __future__ import annotations

from typing import Any

from torch import nn

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.engine.parallel import inner
from opacus_bpclip.errors import CoverageError
from opacus_bpclip.model.coverage import declared_uses, trainable_layers, unclipped_inputs
from opacus_bpclip.model.plan import Plan
from opacus_bpclip.model.sharding import unsharded
from opacus_bpclip.probe import Prober, with_uses


def require_compatible(
    module: nn.Module, config: BackpropClipping | None = None, data_loader: object = None
) -> None:
    """Check that every trainable parameter has a rule, and that examples keep apart.

    Args:
        module: the model; it is not changed.
        config: how it would be clipped.
        data_loader: for the shapes of its examples; without one, the model is not run.

    Raises:
        CoverageError: the model would be refused; the message names each module, says why, and
            what to do.
    """
    config = config or BackpropClipping()
    module = inner(module)
    with unsharded(module):
        trainable_layers(module, declared_uses(config))
        if data_loader is not None:
            try_out(config, module=module, data_loader=data_loader)


def try_out(
    config: BackpropClipping,
    *,
    module: nn.Module,
    data_loader: object,
    loss_reduction: str = "mean",
    batch_first: bool = True,
    loss_outside: bool = False,
    **_: Any,
) -> tuple[BackpropClipping, dict[object, Plan]]:
    """Run a model on made-up examples of a data loader's shapes.

    Returns:
        The options with the uses counted, and the ways of calling the model that were searched,
        with what was found of the functions that it calls on parameters.

    Raises:
        CoverageError: examples are coupled, or uses are to be counted and cannot be.
    """
    prober = Prober(
        module,
        loss_reduction=loss_reduction,
        layers=trainable_layers(module, batch_first=batch_first),
        ordered=config.allocation == "joint",
        search=config.probe,
    )
    problem = prober.before_training(
        data_loader, batch_first=batch_first, loss_outside=loss_outside
    )
    if problem:
        raise CoverageError(problem.text)
    for tried in prober.passed.values():
        problem_text = unclipped_inputs(prober.layers, tried.passed_by, config.max_input_norm)
        if problem_text is not None:
            raise CoverageError(problem_text)
    plan = next(iter(prober.passed.values()), None)
    config = with_uses(config, module, data_loader, batch_first=batch_first, plan=plan)
    return config, prober.passed
