"""The methods of Opacus's engine, extended by ``clipping="backprop"``.

Each public function here extends the engine's method of the same name, and gets the bound original
as its first argument. So `PrivacyEngine` and `register` share it. All arguments are checked before
anything is changed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import opacus
import torch
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader, Subset

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.engine.checkpoints import account_of
from opacus_bpclip.engine.module import BackpropClipModule
from opacus_bpclip.engine.parallel import inner
from opacus_bpclip.engine.request import Request, checked, require_equal_ranks
from opacus_bpclip.engine.sources import sources_of
from opacus_bpclip.engine.validation import checked_options
from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.guard.seeds import Purpose
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.model.sharding import gathered
from opacus_bpclip.optimizer.accounting import AccountStep
from opacus_bpclip.optimizer.optimizer import BackpropClipOptimizer
from opacus_bpclip.optimizer.ranks import generator_of_rank
from opacus_bpclip.sampling.loader import PrivateDataLoader

Original = Callable[..., Any]

_REQUEST = "_backprop_request"


def _options(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's parameters, without ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


# Read at import: the functions that `register` installs accept any name.
_MAKE_PRIVATE_OPTIONS = _options(opacus.PrivacyEngine.make_private)
_WITH_EPSILON_OPTIONS = _options(opacus.PrivacyEngine.make_private_with_epsilon)


def make_private(
    original: Original,
    engine: opacus.PrivacyEngine,
    *,
    clipping: str = "flat",
    backprop: BackpropClipping | None = None,
    physical_batch_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """Extend ``make_private``; see `PrivacyEngine.make_private`."""
    request: Request | None = getattr(engine, _REQUEST, None)
    if clipping != "backprop":
        refuse_options(clipping, backprop, physical_batch_size)
        return original(clipping=clipping, **kwargs)
    if request is not None and request.entered:
        return original(clipping=clipping, **kwargs)
    if request is None:
        unknown = sorted(set(kwargs) - _MAKE_PRIVATE_OPTIONS)
        if unknown:
            raise ValueError(f"Unknown options for make_private: {', '.join(unknown)}.")
        request = checked(engine, backprop, physical_batch_size, kwargs, kwargs)
    else:
        kwargs = {key: kwargs[key] for key in kwargs if key in _MAKE_PRIVATE_OPTIONS}
        inside = kwargs | {"module": inner(kwargs["module"])}
        with gathered(inside["module"]), request.ranks.together():
            checked_options(engine, request.config, request.physical_batch_size, **inside)
    kwargs["grad_sample_mode"] = "hooks"
    kwargs.pop("criterion", None)  # Opacus's own; the request carries the private one.
    with _requested(engine, replace(request, entered=True)) as request:
        try:
            module, optimizer, data_loader = original(clipping=clipping, **kwargs)
            rate = 1 / len(data_loader)
            optimizer.attach_step_hook(AccountStep(engine.accountant, rate, engine=engine))
            if isinstance(data_loader, PrivateDataLoader):
                optimizer._sampler = data_loader.batch_sampler
            require_equal_ranks(request, optimizer, data_loader)
            # The ranks' accountants count the same steps, of which one rank may save.
            account = account_of(engine)
            account.segment = request.ranks.first(account.segment)
            sources_of(engine).add(optimizer)
        except BaseException:
            if request.hooks is not None:
                request.hooks._undo()
            raise
    if request.criterion is None:
        return module, optimizer, data_loader
    return module, optimizer, request.criterion, data_loader


def make_private_with_epsilon(
    original: Original,
    engine: opacus.PrivacyEngine,
    *,
    clipping: str = "flat",
    backprop: BackpropClipping | None = None,
    physical_batch_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """Extend ``make_private_with_epsilon``; see `PrivacyEngine.make_private_with_epsilon`."""
    if clipping != "backprop":
        refuse_options(clipping, backprop, physical_batch_size)
        return original(clipping=clipping, **kwargs)
    if getattr(engine, _REQUEST, None) is not None:
        return original(clipping=clipping, **kwargs)
    _refuse_unknown_for_epsilon(kwargs)
    # Opacus passes unknown options to the noise search, too. So the request carries this package's.
    options = {"noise_multiplier": 1.0, **kwargs}
    request = checked(engine, backprop, physical_batch_size, kwargs, options)
    with _requested(engine, request):
        return original(clipping=clipping, **kwargs)


def prepare_model(
    original: Original,
    engine: opacus.PrivacyEngine,
    module: nn.Module,
    *,
    max_grad_norm: Any = 1.0,
    loss_reduction: str = "mean",
    batch_first: bool = True,
    wrap_model: bool = True,
    **kwargs: Any,
) -> Any:
    """Extend ``_prepare_model``: attach the hooks."""
    request: Request | None = getattr(engine, _REQUEST, None)
    if request is None:
        return original(
            module,
            max_grad_norm=max_grad_norm,
            loss_reduction=loss_reduction,
            batch_first=batch_first,
            wrap_model=wrap_model,
            **kwargs,
        )
    module = inner(module)
    engine.validate(module=module, optimizer=None, data_loader=None)
    attach = BackpropClipModule if wrap_model else BackpropClipHooks
    request.hooks = attach(
        module,
        config=request.config,
        max_grad_norm=max_grad_norm,
        loss_reduction=loss_reduction,
        batch_first=batch_first,
        criterion=request.criterion,
        ranks=request.ranks,
    )
    request.hooks._prober.passed |= request.passed
    return request.hooks


def prepare_data_loader(
    original: Original,
    engine: opacus.PrivacyEngine,
    data_loader: DataLoader[Any],
    *,
    poisson_sampling: bool,
    distributed: bool,
    **kwargs: Any,
) -> DataLoader[Any]:
    """Extend ``_prepare_data_loader``: make a loader that records what it samples."""
    request: Request | None = getattr(engine, _REQUEST, None)
    if request is None or not poisson_sampling:
        return original(
            data_loader, poisson_sampling=poisson_sampling, distributed=distributed, **kwargs
        )
    assert request.hooks is not None
    _note_dataset(engine, data_loader.dataset)
    private = PrivateDataLoader.from_data_loader(
        data_loader,
        distributed=distributed,
        generator=_sampling_generator(engine, data_loader, request.ranks),
        **kwargs,
    )
    if request.physical_batch_size is not None:
        private.in_constant_shape(request.physical_batch_size)
    request.hooks._sample_from(private.samples)
    return private


def prepare_optimizer(
    original: Original, engine: opacus.PrivacyEngine, *, optimizer: Any, **kwargs: Any
) -> Any:
    """Extend ``_prepare_optimizer``: make the optimizer that adds the noise."""
    request: Request | None = getattr(engine, _REQUEST, None)
    if request is None:
        return original(optimizer=optimizer, **kwargs)
    if isinstance(optimizer, DPOptimizer):
        optimizer = optimizer.original_optimizer
    assert request.hooks is not None
    ranks = request.ranks
    # Opacus rounds down: a rate such as 1/49 may make the expected batch size 0 instead of 1.
    expected = max(kwargs["expected_batch_size"], 1 / ranks.size)
    generator = engine.secure_rng if engine.secure_mode else kwargs["noise_generator"]
    device = request.hooks._guard.parameters.device
    if device is not None and not engine.secure_mode:
        if ranks.sharded and ranks.size > 1:
            generator = generator_of_rank(ranks, generator, device, Purpose.NOISE)
        generator = sources_of(engine).own(generator, device, Purpose.NOISE)
    return BackpropClipOptimizer(
        optimizer,
        hooks=request.hooks,
        noise_multiplier=kwargs["noise_multiplier"],
        max_grad_norm=kwargs["max_grad_norm"],
        expected_batch_size=expected,
        loss_reduction=kwargs["loss_reduction"],
        generator=generator,
        secure_mode=engine.secure_mode,
    )


def _sampling_generator(
    engine: opacus.PrivacyEngine, loader: DataLoader[Any], ranks: Ranks
) -> torch.Generator | None:
    """Return the generator from which a rank samples its examples."""
    if engine.secure_mode:
        return engine.secure_rng
    cpu, generator = torch.device("cpu"), loader.generator
    if ranks.size > 1:
        generator = generator_of_rank(ranks, generator, cpu, Purpose.SAMPLING)
    return sources_of(engine).own(generator, cpu, Purpose.SAMPLING)


@contextmanager
def _requested(engine: opacus.PrivacyEngine, request: Request) -> Iterator[Request]:
    before = getattr(engine, _REQUEST, None)
    setattr(engine, _REQUEST, request)
    try:
        yield request
    finally:
        if before is None:
            delattr(engine, _REQUEST)
        else:
            setattr(engine, _REQUEST, before)


def refuse_options(clipping: object, backprop: object, physical_batch_size: object = None) -> None:
    """Refuse the options of ``clipping="backprop"`` with any other clipping, and in its place.

    Raises:
        ValueError: one of them is set, or ``clipping`` is one.
    """
    if isinstance(clipping, BackpropClipping):
        raise ValueError(
            'Expected clipping to be a name. Pass clipping="backprop" and the options as backprop='
            f"{clipping!r}."
        )
    given = {"backprop": backprop, "physical_batch_size": physical_batch_size}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} was given with clipping={clipping!r}, but needs "
                'clipping="backprop".'
            )


def _note_dataset(engine: opacus.PrivacyEngine, dataset: Any) -> None:
    """Warn, as Opacus does, if the engine was used with another data set before."""
    if isinstance(dataset, Subset):
        dataset = dataset.dataset
    if engine.dataset is None:
        engine.dataset = dataset
    elif engine.dataset is not dataset:
        warnings.warn(
            f"PrivacyEngine detected new dataset object. Was: {engine.dataset}, got: {dataset}. "
            "The accountant adds up the privacy spent on one data set. Make a new engine for "
            "another one. If both objects hold the same data, ignore this warning.",
            stacklevel=2,
        )


def _refuse_unknown_for_epsilon(kwargs: dict[str, Any]) -> None:
    # Opacus passes some options to the noise search, and `alphas` to the RDP accountant.
    known = _MAKE_PRIVATE_OPTIONS | _WITH_EPSILON_OPTIONS | _options(get_noise_multiplier)
    unknown = sorted(set(kwargs) - known - {"alphas"})
    if unknown:
        raise ValueError(f"Unknown options for make_private_with_epsilon: {', '.join(unknown)}.")
