"""Models sharded by FSDP2 (``fully_shard``), and their unsharded parameters.

While a module runs, FSDP replaces each sharded parameter by an unsharded one. This is always the
same object, whose memory FSDP allocates and frees. So the model is examined and clipped with its
unsharded parameters, and only the optimizer handles shards.
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
    """Return whether FSDP2 shards some of the model's parameters."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def sharding_problem(model: nn.Module) -> str | None:
    """Return a message if the model is sharded in a way that is not supported."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        if mesh.ndim != 1 or mesh.size() != dist.get_world_size():
            return (
                f"{name} is sharded over a mesh of shape {tuple(mesh.shape)} in a process group of "
                f"{dist.get_world_size()} ranks. Hybrid sharding and tensor parallelism are not "
                "supported. Call fully_shard(model) without a mesh, which shards over all ranks."
            )
        if parameter.device.type != mesh.device_type:
            return (
                f"{name} is offloaded to {parameter.device.type}, but the noise is drawn on "
                f"{mesh.device_type}. Call fully_shard without an offload_policy."
            )
    return None


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Unshard all parameters inside this context. All ranks must enter it."""
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
    """Make the model an ordinary one inside this context: its calls do not wait for other ranks.

    All ranks must enter it. Hooks that are added inside are lost at its end.
    """
    if not is_sharded(model):
        yield
        return
    with gathered(model):  # also makes FSDP register the last of its hooks
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
    """Map each sharded parameter to its unsharded one. All ranks must call this."""
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
    """Unshards layers' parameters again if FSDP has resharded them before the sums are computed.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._shards: dict[nn.Module, FSDPModule] = {}  # the innermost one around each module
        names = dict(model.named_modules())
        for name, module in names.items():
            around = names[name.rpartition(".")[0]]
            shard = module if isinstance(module, FSDPModule) else self._shards.get(around)
            if shard is not None:
                self._shards[module] = shard

    @contextmanager
    def of(self, layer: Layer) -> Iterator[None]:
        """Unshard a layer's parameters inside this context. All ranks must enter it."""
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
