"""The ways in which a training loop may call its model on a batch of a data loader."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from opacus_bpclip.probe.batches import EXAMPLES, Batch
from opacus_bpclip.probe.randomness import repeatable

Call = tuple[tuple[Any, ...], dict[str, Any]]


def made_up_batches(
    loader: object, model: nn.Module, *, batch_first: bool = True
) -> Iterator[Batch]:
    """Yield made-up batches for each way in which a loop over ``loader`` may call ``model``.

    Shapes and dtypes are those of the data set's first example, collated; the values are made up.
    Nothing is yielded where there is no first example that could be read. Calls that the signature
    of the model's ``forward`` does not allow are left out.
    """
    axis = 0 if batch_first else 1
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    try:
        with repeatable(torch.device("cpu")):
            # Augmentation may draw random numbers; the generators are restored.
            collated = loader.collate_fn([loader.dataset[0]] * EXAMPLES)
    except Exception:
        # The user's own code, whose error training will report.
        return
    for args, kwargs in calls(collated, model):
        yield Batch(args, kwargs, EXAMPLES, axis).invent(EXAMPLES)


def calls(collated: Any, model: nn.Module) -> Iterator[Call]:
    """Yield the ways to call a model on one batch that its signature allows, the likeliest first.

    A mapping is passed by name: all of it, then only the arguments that ``forward`` has, then all
    but the labels; then as one argument. Of a tuple, the first element is passed, then the first
    two, and so on to all of them; then the elements of the first one, if that is a tuple; then the
    tuple as one argument. So a model with one input does not get the label as an optional mask.
    """
    for args, kwargs in _forms(collated, model):
        if _fits(model, args, kwargs):
            yield args, kwargs


def _forms(collated: Any, model: nn.Module) -> Iterator[Call]:
    whole: Call = (collated,), {}
    if isinstance(collated, Mapping):
        named = {name: value for name, value in collated.items() if isinstance(name, str)}
        yield (), named
        known = _parameters(model)
        if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            taken = {name: value for name, value in named.items() if name in known}
            if taken and len(taken) < len(named):
                yield (), taken
        unlabelled = {name: value for name, value in named.items() if not _is_label(name)}
        if len(unlabelled) < len(named):
            yield (), unlabelled
    elif isinstance(collated, (tuple, list)):
        if hasattr(collated, "_fields"):
            yield whole
        for count in range(1, len(collated) + 1):
            yield tuple(collated[:count]), {}
        if collated and isinstance(collated[0], (tuple, list)):
            yield tuple(collated[0]), {}
    yield whole


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        # Compiled code has no signature: assume that it takes any arguments.
        return inspect.signature(lambda *args, **kwargs: None).parameters


def _fits(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        inspect.Signature(list(_parameters(model).values())).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _is_label(name: str) -> bool:
    return "label" in name or "target" in name


def argument_name(model: nn.Module, index: int) -> str:
    """Return the name of the ``forward`` argument in this position, empty if it has none."""
    known = [p for p in _parameters(model).values() if p.kind is not p.KEYWORD_ONLY]
    return known[index].name if index < len(known) else ""
