"""Check before anything is attached whether a model can be trained within the guarantee."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from opacus_bpclip.config import BackpropClipping, PinkNoise
from opacus_bpclip.engine.parallel import inner
from opacus_bpclip.errors import CoverageError
from opacus_bpclip.model.coverage import declared_uses, trainable_layers, unclipped_inputs
from opacus_bpclip.model.plan import Plan
from opacus_bpclip.model.sharding import unsharded
from opacus_bpclip.model.views import FoldViews
from opacus_bpclip.probe import Prober, with_uses
from opacus_bpclip.probe.forms import argument_name, made_up_batches


def require_compatible(
    module: nn.Module, config: BackpropClipping | None = None, data_loader: object = None
) -> None:
    """Check that a rule bounds every trainable parameter, and that examples are independent.

    Args:
        module: the model; it is not changed.
        config: the options of the clipping; the defaults if ``None``.
        data_loader: gives the shapes of the made-up examples; without one, the model is not run.

    Raises:
        CoverageError: the model would be refused; the message says for each module why, and what
            to do.
    """
    config = config or BackpropClipping()
    module = inner(module)
    with unsharded(module):
        trainable_layers(module, declared_uses(config))
        if data_loader is not None:
            try_out(config, module=module, data_loader=data_loader)
            with_image_shape(config, module=module, data_loader=data_loader)


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
    """Try a model on made-up examples that have the shapes of a data loader's items.

    Args:
        config: the options of the clipping.
        module: the model; it is not changed.
        data_loader: gives the shapes of the examples.
        loss_reduction: ``"mean"`` or ``"sum"``.
        batch_first: whether the batch is the first axis of the model's inputs; otherwise the
            second.
        loss_outside: whether the loss is computed by a criterion of `make_private`.

    Returns:
        The options with the uses counted; and, by the form of the call, the plan for the functions
        that the model calls on parameters.

    Raises:
        CoverageError: examples are coupled, or the uses cannot be counted.
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


def with_image_shape(
    config: BackpropClipping,
    *,
    module: nn.Module,
    data_loader: object,
    batch_first: bool = True,
    **_: Any,
) -> BackpropClipping:
    """Give `PinkNoise` without a shape that of the data loader's first input.

    Args:
        config: the options of the clipping.
        module: the model.
        data_loader: gives the shape, which is public as all shapes of inputs are.
        batch_first: whether the batch is the first axis of the model's inputs.

    Raises:
        ValueError: the model's input is no image, or it is unknown what it is.
    """
    whitening = config.whitening
    if whitening is None or not isinstance(whitening.probes, PinkNoise) or whitening.probes.shape:
        return config
    # In evaluation, in which the public images are seen, each view is a row of its own.
    axes = 2 if any(isinstance(each, FoldViews) for each in module.modules()) else 1
    for batch in made_up_batches(data_loader, module) if batch_first else ():
        if batch.kwargs.keys() - {argument_name(module, 0)}:
            continue  # The noise is the model's first argument.
        first, *others = (*batch.args, *batch.kwargs.values())
        if isinstance(first, Tensor) and first.is_floating_point() and not others:
            if first.dim() < axes + 3:
                break
            probes = replace(whitening.probes, shape=tuple(first.shape[axes:]))
            return replace(config, whitening=replace(whitening, probes=probes))
    raise ValueError(
        "InputWhitening learns from pink noise in the shape of the model's inputs, and from the "
        "data loader's first item these are not known to be images: one tensor of floats "
        "[channels, height, width], the model's first argument. If they are, give their shape: "
        "BackpropClipping.for_images(shape) or PinkNoise(shape). If not, give "
        "InputWhitening(probes) a function of the step's number that returns public examples of "
        "what the model is called with."
    )
