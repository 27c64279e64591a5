"""The request of one call of make_private, which all ranks check before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import opacus
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.engine.compatibility import try_out, with_image_shape
from opacus_bpclip.engine.parallel import inner, ranks_of
from opacus_bpclip.engine.validation import checked_loader, checked_options
from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.losses.criterion import BackpropClipCriterion
from opacus_bpclip.model.plan import Plan
from opacus_bpclip.model.sharding import unsharded
from opacus_bpclip.optimizer.optimizer import BackpropClipOptimizer
from opacus_bpclip.sampling.identity import ONE_DATA_SET, identity, not_dealt_out

_ONE_ORDER = (
    "The ranks' sums are added in the order of the optimizer's parameters. In different orders, "
    "the sums of different parameters would be added, and get the wrong noise. Give the optimizer "
    "the same parameters in the same order on each rank, for example model.parameters(), not a set."
)


@dataclass
class Request:
    """The state of one call of make_private, which the engine's inner methods share.

    Attributes:
        config: the options, with the uses counted.
        passed: by the form of the call, the plans from the trial on made-up examples.
        ranks: the ranks that train the model together.
        criterion: the private criterion, if one was passed.
        physical_batch_size: the option.
        entered: whether the original make_private is running.
        hooks: the hooks, once they are attached.
    """

    config: BackpropClipping
    passed: dict[object, Plan]
    ranks: Ranks
    criterion: BackpropClipCriterion | None = None
    physical_batch_size: int | None = None
    entered: bool = False
    hooks: BackpropClipHooks | None = None


def checked(
    engine: opacus.PrivacyEngine,
    backprop: object,
    physical_batch_size: int | None,
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> Request:
    """Check all arguments and try the model on made-up examples, in the same way on all ranks.

    Args:
        engine: the engine.
        backprop: the option.
        physical_batch_size: the option.
        kwargs: the arguments of the call. The loader is replaced by the one to sample from, and
            the criterion is removed.
        options: the arguments to check.

    Raises:
        CoverageError: the model is refused.
        ValueError: another argument is wrong, or the ranks differ.
    """
    ranks = ranks_of(kwargs["module"], called=not kwargs.get("wrap_model", True))
    module = inner(kwargs["module"])
    with unsharded(module), ranks.together():
        config = checked_options(
            engine, backprop, physical_batch_size, **options | {"module": module}
        )
        kwargs |= checked_loader(**kwargs)
        if not kwargs.get("poisson_sampling", True):
            problem = not_dealt_out(kwargs["data_loader"], ranks)
            if problem:
                raise ValueError(problem)
        criterion = _private_criterion(kwargs)
        inside = kwargs | {"module": module}
        config, passed = try_out(config, loss_outside=criterion is not None, **inside)
        config = with_image_shape(config, **inside)
    ranks.require_equal_values(
        {name: p for name, p in module.named_parameters() if not isinstance(p, DTensor)}
    )
    return Request(config, passed, ranks, criterion, physical_batch_size)


def require_equal_ranks(
    request: Request, optimizer: BackpropClipOptimizer, loader: DataLoader[Any]
) -> None:
    """Check that the ranks agree on the settings, the order of parameters and the data set.

    Raises:
        ValueError: they differ.
    """
    ranks = request.ranks
    if ranks.size == 1:
        return
    ranks.require_equal(optimizer._settings())
    names = {p: name for name, p in optimizer._hooks._module.named_parameters()}
    ranks.require_equal(
        {
            f"the optimizer's parameter {index}": (names.get(p), tuple(p.shape), str(p.dtype))
            for index, p in enumerate(optimizer.params)
        },
        _ONE_ORDER,
    )
    with ranks.together():
        items = identity(loader)
    ranks.require_equal(items, ONE_DATA_SET, known_only=True)


def _private_criterion(kwargs: dict[str, Any]) -> BackpropClipCriterion | None:
    """Remove the criterion from the arguments; return the private one, or ``None``."""
    criterion = kwargs.pop("criterion", None)
    if criterion is None:
        return None
    reduction = kwargs.get("loss_reduction", "mean")
    return BackpropClipCriterion(criterion, loss_reduction=reduction)
