"""Check the arguments of ``make_private(clipping="backprop")`` before anything is changed."""

from __future__ import annotations

import inspect
from typing import Any

import opacus
from opacus.grad_sample import AbstractGradSampleModule
from torch import nn
from torch.utils.data import DataLoader

from opacus_bpclip.clipping.allocation import layer_fractions, noise_weights
from opacus_bpclip.config import BackpropClipping, is_positive_number
from opacus_bpclip.guard.precision import rounded_mean, rounded_options
from opacus_bpclip.model.coverage import declared_uses, trainable_layers
from opacus_bpclip.model.tying import tied_groups
from opacus_bpclip.optimizer.several import SeveralOptimizers
from opacus_bpclip.sampling.collating import problem_of_collating
from opacus_bpclip.sampling.items import sampled_items


def checked_options(
    engine: opacus.PrivacyEngine,
    backprop: object,
    physical_batch_size: object = None,
    *,
    module: nn.Module,
    optimizer: Any,
    max_grad_norm: object,
    noise_multiplier: object,
    criterion: object = None,
    loss_reduction: str = "mean",
    batch_first: bool = True,
    poisson_sampling: bool = True,
    grad_sample_mode: str = "hooks",
    rand_on_empty: bool = False,
    **_: Any,
) -> BackpropClipping:
    """Check the arguments of ``make_private``, without running the model or changing anything.

    The arguments are those of `PrivacyEngine.make_private`.

    Returns:
        The options, ``BackpropClipping()`` if none were given.

    Raises:
        CoverageError: no rule bounds some trainable parameter.
        ValueError: another argument is wrong; the message says which, why, and what to do.
    """
    if backprop is None:
        backprop = BackpropClipping()
    if not isinstance(backprop, BackpropClipping):
        raise ValueError(f"Expected backprop={backprop!r} to be a BackpropClipping.")
    if isinstance(max_grad_norm, (list, tuple)):
        raise ValueError(
            f"Expected max_grad_norm={max_grad_norm!r} to be one number, the sensitivity of all "
            "layers together. Split it over the layers with "
            "BackpropClipping(allocation={name: share})."
        )
    if not is_positive_number(max_grad_norm):
        raise ValueError(f"Expected max_grad_norm={max_grad_norm!r} to be a finite number > 0.")
    if not _is_noise_multiplier(noise_multiplier):
        raise ValueError(
            f"Expected noise_multiplier={noise_multiplier!r} to be a finite number >= 0."
        )
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f'Expected loss_reduction={loss_reduction!r} to be "mean" or "sum".')
    if grad_sample_mode != "hooks":
        raise ValueError(
            f'grad_sample_mode={grad_sample_mode!r} cannot be used with clipping="backprop", which '
            "computes no grad_sample. Leave grad_sample_mode out."
        )
    if rand_on_empty:
        raise ValueError(
            "rand_on_empty=True adds a made-up example to empty batches, which would be treated "
            'as data. Leave it out: clipping="backprop" takes steps on empty batches.'
        )
    _require_physical_batch_size(physical_batch_size, poisson_sampling=poisson_sampling)
    _refuse_optimizer(optimizer)
    _refuse_wrapped(module)
    uses = declared_uses(backprop)
    groups = tied_groups(trainable_layers(module, uses, batch_first=batch_first))
    if loss_reduction == "mean" and criterion is None:
        _refuse_rounded_mean(module)
        problem = rounded_options(backprop, module.parameters())
        if problem:
            raise ValueError(problem)
    if backprop.allocation != "joint":
        sizes = {name: group.size for name, group in groups.items()}
        layer_fractions(sizes, backprop.allocation)
        noise_weights(sizes, backprop.layer_noise)
    # Opacus's own checks come last, since this package's messages are more specific.
    engine.validate(module=module, optimizer=None, data_loader=None)
    return backprop


def checked_loader(
    *,
    data_loader: DataLoader[Any],
    batch_first: bool = True,
    poisson_sampling: bool = True,
    **_: Any,
) -> dict[str, Any]:
    """Check the data loader that a private loader is to replace.

    Returns:
        The argument ``data_loader`` for Opacus: a loader over exactly the items that the given one
        yields. Empty without Poisson sampling.

    Raises:
        ValueError: the loader cannot be replaced, has an item several times, or makes several
            rows of one item, or one that depends on other items.
    """
    if not poisson_sampling:
        return {}
    data_loader = sampled_items(data_loader)
    if problem := problem_of_collating(data_loader, axis=0 if batch_first else 1):
        raise ValueError(problem)
    return {"data_loader": data_loader}


def _is_noise_multiplier(value: object) -> bool:
    return is_positive_number(value) or (not isinstance(value, bool) and value == 0)


def _refuse_rounded_mean(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        problem = rounded_mean(name, parameter.dtype) if parameter.requires_grad else None
        if problem:
            raise ValueError(problem)


def _require_physical_batch_size(value: object, *, poisson_sampling: bool) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"Expected physical_batch_size={value!r} to be an integer >= 1, the number of rows of "
            "each batch that the loader yields, or None."
        )
    if not poisson_sampling:
        raise ValueError(
            f"physical_batch_size={value} pads the batches of the private loader, but "
            "poisson_sampling=False keeps your own loader. Leave one of them out."
        )


def _refuse_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, SeveralOptimizers):
        for each in optimizer.optimizers:
            _refuse_optimizer(each)
    step = inspect.signature(type(optimizer).step).parameters.get("closure")
    if step is not None and step.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times per step, and each "
            "evaluation would be a release of its own. Use an optimizer that needs one gradient "
            "per step, such as SGD or Adam."
        )


def _refuse_wrapped(module: nn.Module) -> None:
    if isinstance(module, AbstractGradSampleModule) or hasattr(
        module, "autograd_grad_sample_hooks"
    ):
        raise ValueError(
            f"The model is wrapped already ({type(module).__name__}). Pass the original model: "
            "to_standard_module() or cleanup() removes the wrapping."
        )
    if hasattr(module, "_orig_mod") or any(
        child._compiled_call_impl is not None for child in module.modules()
    ):
        raise ValueError(
            "The model is compiled already, and a compiled graph may ignore hooks that are added "
            "later. Call make_private first, then torch.compile the model that it returns."
        )
