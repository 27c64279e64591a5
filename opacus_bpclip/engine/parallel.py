"""Models that are wrapped for several ranks: which wrappers there are, and what is inside."""

from __future__ import annotations

import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.model.sharding import is_sharded, sharding_problem

_SHELLS = (DifferentiallyPrivateDistributedDataParallel, DistributedDataParallel)

_GRAPHS = {
    DistributedDataParallel: (
        "A graph of torch.compile sends its sums through autograd, where DistributedDataParallel "
        "takes part in them. Wrap the model in opacus.distributed's "
        "DifferentiallyPrivateDistributedDataParallel instead, or train without torch.compile."
    ),
    FSDPModule: (
        "A graph of torch.compile sends its sums through autograd, where FSDP would average them. "
        "Train without torch.compile, or without fully_shard."
    ),
}


def inner(module: nn.Module) -> nn.Module:
    """Return the model inside a wrapper for data parallelism; itself without one.

    Such wrappers compute nothing. They have made the ranks' parameters equal; gradients and noise
    are the private optimizer's.
    """
    return module.module if isinstance(module, _SHELLS) else module


def ranks_of(module: nn.Module) -> Ranks:
    """Return the ranks that train a model together. All of them must call this.

    Raises:
        ValueError: it is wrapped in a way that is not supported, or not wrapped at all though the
            process group has several ranks.
    """
    problem = _wrapping_problem(module)
    if problem is None and not isinstance(module, (*_SHELLS, FSDPModule)):
        problem = Ranks().problem()
        if problem is None:
            return Ranks()
    if problem is not None:
        raise ValueError(problem)
    ranks = Ranks.of_process_group() if dist.get_world_size() > 1 else Ranks()
    ranks.sharded = is_sharded(module)
    for kind, text in _GRAPHS.items():
        if isinstance(module, kind):
            ranks.graphs_problem = text
    return ranks


def _wrapping_problem(module: nn.Module) -> str | None:
    """Say why a wrapper is not supported."""
    original = getattr(module, "_orig_mod", module)
    if isinstance(original, (DataParallel, FullyShardedDataParallel)):
        return (
            f'{type(original).__name__} is not supported with clipping="backprop". Use one process '
            "for each device, with fully_shard(model) of torch.distributed.fsdp, or "
            "opacus.distributed's DifferentiallyPrivateDistributedDataParallel(model)."
        )
    if isinstance(module, _SHELLS) and is_sharded(module):
        return (
            f"{type(module).__name__} is around a model that fully_shard has sharded. Use one of "
            "the two."
        )
    if is_sharded(module) and not isinstance(module, FSDPModule):
        return (
            "A part of the model is sharded, the model itself is not. Call fully_shard(model) on "
            "the whole model, too, as the last."
        )
    return sharding_problem(module)
