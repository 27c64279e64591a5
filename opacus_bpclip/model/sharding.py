"""Parameters that FSDP2 (``fully_shard``) keeps in parts, and the whole ones of the layers.

While a module runs, FSDP puts a whole parameter in the place of the sharded one. It is always the
same object, whose memory comes and goes. So the model is examined, and layers are clipped, with
whole parameters; the optimizer alone knows of shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opacus_bpclip.model.layer import Layer

_FSDP = "torch.distributed.fsdp."
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 keeps some of the model's parameters in parts."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def sharding_problem(model: nn.Module) -> str | None:
    """Say which way of sharding a model is not supported."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        if mesh.ndim != 1 or mesh.size() != dist.get_world_size():
            return (
                f"{name} is sharded over a mesh of shape {tuple(mesh.shape)} in a process group of "
                f"{dist.get_world_size()} ranks: hybrid sharding and tensor parallelism are not "
                "supported. Call fully_shard(model) without a mesh, which shards over all ranks."
            )
        if parameter.device.type != mesh.device_type:
            return (
                f"{name} is offloaded to {parameter.device.type}, and the noise would be drawn on "
                f"{mesh.device_type}. Call fully_shard without an offload_policy."
            )
    return None


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have all parameters whole for a while. All ranks must enter this."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for shard in shards:
            shard.unshard()
        yield
    finally:
        for shard in shards:
            shard.reshard()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Have an ordinary model for a while, no call of which waits for another rank.

    All ranks must enter this. Hooks that are added inside do not stay.
    """
    if not is_sharded(model):
        yield
        return
    with gathered(model):  # which makes FSDP register the last of its hooks
        taken = []
        for hooks in (getattr(module, kind) for module in model.modules() for kind in _HOOKS):
            if any(map(_is_fsdp, hooks.values())):
                taken.append((hooks, dict(hooks)))
                for key in [key for key, hook in hooks.items() if _is_fsdp(hook)]:
                    del hooks[key]
        try:
            yield
        finally:
            for hooks, before in taken:
                hooks.clear()
                hooks.update(before)


def whole_parameters(model: nn.Module) -> Mapping[nn.Parameter, nn.Parameter]:
    """Return the whole parameter of each sharded one. All ranks must call this."""
    sharded = [(module, dict(module._parameters)) for module in model.modules()]
    with gathered(model):
        return {
            parameter: whole
            for module, parameters in sharded
            for name, parameter in parameters.items()
            if parameter is not None
            and (whole := module._parameters[name]) is not None
            and whole is not parameter
        }


class Presence:
    """Makes layers' parameters whole again where FSDP has taken them apart too early.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._shards: dict[nn.Module, FSDPModule] = {}  # the nearest around each module
        names = dict(model.named_modules())
        for name, module in names.items():
            around = names[name.rpartition(".")[0]]
            shard = module if isinstance(module, FSDPModule) else self._shards.get(around)
            if shard is not None:
                self._shards[module] = shard

    @contextmanager
    def of(self, layer: Layer) -> Iterator[None]:
        """Have a layer's parameters whole for a while. All ranks must enter this."""
        shard = self._shards.get(layer.module)
        if shard is None or layer.replaced_parameter() is None:
            yield
            return
        shard.unshard()
        try:
            yield
        finally:
            shard.reshard()


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)
