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


def ranks_of(module: nn.Module, *, called: bool = False) -> Ranks:
    """Return the ranks that train a model together. All of them must call this.

    Args:
        module: the model, in a wrapper where there are several ranks.
        called: whether the wrapper itself is called in training.

    Raises:
        ValueError: it is wrapped in a way that is not supported, or not wrapped at all though the
            process group has several ranks.
    """
    problem = _wrapping_problem(module) or (_buffers_problem(module) if called else None)
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


def _buffers_problem(module: nn.Module) -> str | None:
    """Say that each forward pass of a wrapper would wait for the other ranks' buffers."""
    if (
        isinstance(module, DistributedDataParallel)
        and module.broadcast_buffers
        and next(module.buffers(), None) is not None
        and dist.get_world_size() > 1
    ):
        return (
            "DistributedDataParallel sends rank 0's buffers to all ranks before each forward pass, "
            "and waits for them; but ranks may have other numbers of physical batches in a step, "
            "which their private samples decide, and then wait for ever. Wrap the model with "
            "DistributedDataParallel(model, broadcast_buffers=False), or leave wrap_model=False "
            "out."
        )
    return None


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
