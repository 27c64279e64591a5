"""The supported wrappers for training on several ranks, and the models inside them."""

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
        "A graph of torch.compile sends its clipped sums through autograd, where "
        "DistributedDataParallel interferes with them. Wrap the model in opacus.distributed's "
        "DifferentiallyPrivateDistributedDataParallel instead, or train without torch.compile."
    ),
    FSDPModule: (
        "A graph of torch.compile sends its clipped sums through autograd, where FSDP would "
        "average them. Train without torch.compile, or without fully_shard."
    ),
}


def inner(module: nn.Module) -> nn.Module:
    """Return the model inside a wrapper for data parallelism, or the model itself without one.

    All that such a wrapper contributes is to make the ranks' parameters equal; the private
    optimizer reduces the gradients and adds the noise.
    """
    return module.module if isinstance(module, _SHELLS) else module


def ranks_of(module: nn.Module, *, called: bool = False) -> Ranks:
    """Return the ranks that train a model together. All of them must call this.

    Args:
        module: the model, wrapped if there are several ranks.
        called: whether training calls the wrapper itself.

    Raises:
        ValueError: the wrapper is not supported, or there is none although the process group has
            several ranks.
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
    """Return a message if each forward pass of a wrapper would wait for the other ranks."""
    if (
        isinstance(module, DistributedDataParallel)
        and module.broadcast_buffers
        and next(module.buffers(), None) is not None
        and dist.get_world_size() > 1
    ):
        return (
            "DistributedDataParallel broadcasts rank 0's buffers before each forward pass, and "
            "each rank waits for them. But the ranks' private samples may give them different "
            "numbers of physical batches in a step, and then a rank would wait forever. Wrap the "
            "model with DistributedDataParallel(model, broadcast_buffers=False), or leave "
            "wrap_model=False out."
        )
    return None


def _wrapping_problem(module: nn.Module) -> str | None:
    """Return a message if the model is wrapped in a way that is not supported."""
    original = getattr(module, "_orig_mod", module)
    if isinstance(original, (DataParallel, FullyShardedDataParallel)):
        return (
            f'{type(original).__name__} is not supported with clipping="backprop". Use one process '
            "for each device, with fully_shard(model) of torch.distributed.fsdp, or "
            "opacus.distributed's DifferentiallyPrivateDistributedDataParallel(model)."
        )
    if isinstance(module, _SHELLS) and is_sharded(module):
        return (
            f"{type(module).__name__} wraps a model that is sharded by fully_shard. Use one of the "
            "two."
        )
    if is_sharded(module) and not isinstance(module, FSDPModule):
        return (
            "A part of the model is sharded, but the model itself is not. Call fully_shard on the "
            "parts first, and on the whole model last."
        )
    return sharding_problem(module)
