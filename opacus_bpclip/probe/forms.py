"""The forms in which a training loop may call its model on what a data loader yields."""

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
    """Yield made-up batches in the forms in which a loop over ``loader`` may call ``model``.

    Shapes and dtypes are those of the data set's first example, collated; the values are made up.
    None is yielded where there is no first example to look at. Forms that the signature of the
    model's ``forward`` does not allow are left out.
    """
    axis = 0 if batch_first else 1
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    try:
        with repeatable(torch.device("cpu")):
            # Augmentation may draw random numbers; they are put back.
            collated = loader.collate_fn([loader.dataset[0]] * EXAMPLES)
    except Exception:
        # Somebody else's code, which training will run and report; nothing to look at here.
        return
    for args, kwargs in calls(collated, model):
        yield Batch(args, kwargs, EXAMPLES, axis).invent(EXAMPLES)


def calls(collated: Any, model: nn.Module) -> Iterator[Call]:
    """Yield the ways to call a model on one batch that its signature allows, the likeliest first.

    A mapping goes in by name, with what ``forward`` does not know left out, then the labels, or as
    it is. Of a tuple
    come the first element, the first two, and so on to all of them, then what the first element
    holds if that is a tuple itself, then the tuple as it is. So a model with one input is not given
    the label for an optional mask.
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
        # Compiled code without a signature takes anything.
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
    """Return what a model's ``forward`` calls its argument in this position, empty if nothing."""
    known = [p for p in _parameters(model).values() if p.kind is not p.KEYWORD_ONLY]
    return known[index].name if index < len(known) else ""
