"""What one call of make_private asks for: checked and tried out on all ranks, before it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import opacus
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.engine.compatibility import try_out
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
    "The ranks' sums are added up one parameter after another: the sum of one would become the "
    "gradient of another, whose noise is not made for it. Give the optimizer the same "
    "parameters in the same order on each rank, for example model.parameters(), not a set."
)


@dataclass
class Request:
    """What one call of make_private hands to the engine's inner steps."""

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
    """Check and try out everything, on all ranks alike.

    Args:
        engine: the engine.
        backprop: the option.
        physical_batch_size: the option.
        kwargs: of the call; gets the loader to sample from, and loses the criterion.
        options: to be checked.
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
        tried = try_out(config, loss_outside=criterion is not None, **inside)
    ranks.require_equal_values(
        {name: p for name, p in module.named_parameters() if not isinstance(p, DTensor)}
    )
    return Request(*tried, ranks, criterion, physical_batch_size)


def require_equal_ranks(
    request: Request, optimizer: BackpropClipOptimizer, loader: DataLoader[Any]
) -> None:
    """Compare between ranks what the accountant goes by, what is added up, and the items.

    Raises:
        ValueError: it differs.
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
    """Take the criterion out of the arguments, made private; ``None`` if none was passed."""
    criterion = kwargs.pop("criterion", None)
    if criterion is None:
        return None
    reduction = kwargs.get("loss_reduction", "mean")
    return BackpropClipCriterion(criterion, loss_reduction=reduction)
