"""The sum over ranks, and its noise.

Noise is drawn once for each number that is released. For a replicated parameter rank 0 adds it to
its own sum before the ranks' sums are added up. For a sharded parameter the sums are added up
first, and each rank adds noise to its shard, from a generator with a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from opacus_bpclip.guard.ranks import Ranks
from opacus_bpclip.guard.seeds import Purpose
from opacus_bpclip.optimizer.noise import with_own_memory


def released(
    sums: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    ranks: Ranks,
    add_noise: Callable[..., None],
    stds: Sequence[float],
) -> list[Tensor]:
    """Return the noised sums over all ranks. The tensors in ``sums`` may be changed in place.

    All ranks must call this.

    Args:
        sums: this rank's sums, one whole tensor for each parameter.
        parameters: the optimizer's parameters, whole or sharded.
        ranks: the ranks that train together.
        add_noise: adds noise of standard deviation ``std`` to every entry of tensors, in place.
        stds: the noise's standard deviation for each sum.

    Returns:
        For a replicated parameter the whole sum, the same on all ranks; for a sharded one this
        rank's shard, as a ``DTensor``.
    """
    sharded = [isinstance(p, DTensor) for p in parameters]
    parts = with_own_memory(_part(s, p) for s, p in zip(sums, parameters, strict=True))
    if ranks.size > 1:
        parts = [part.contiguous() for part in parts]
    pairs = list(zip(parts, sharded, strict=True))
    noisy: dict[float, list[Tensor]] = {}
    for (part, is_shard), std in zip(pairs, stds, strict=True):
        if is_shard or ranks.rank == 0:
            noisy.setdefault(std, []).append(part)
    for std, own in noisy.items():
        add_noise(own, std=std)
    if ranks.size > 1:
        adding = [dist.all_reduce(x, async_op=True) for x, is_shard in pairs if not is_shard]
        for each in adding:
            each.wait()
    return [_as_gradient(part, p) for part, p in zip(parts, parameters, strict=True)]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def generator_of_rank(
    ranks: Ranks, generator: torch.Generator | None, device: torch.device, purpose: Purpose
) -> torch.Generator:
    """Return a generator whose seed differs from other ranks' and from other purposes'.

    All ranks must call this.

    Args:
        ranks: the ranks that train together.
        generator: on rank 0, the source of all ranks' seeds; ``None`` for torch's default one.
        device: the device of the new generator, if ``generator`` is ``None``.
        purpose: what it will draw.
    """
    made = torch.Generator(device if generator is None else generator.device)
    return made.manual_seed(ranks.seed_of_rank(generator, purpose))


def _part(total: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this rank's shard of the sum over ranks; for a replicated parameter, its own sum."""
    if not isinstance(parameter, DTensor):
        return total
    whole = DTensor.from_local(total, parameter.device_mesh, [Partial()], run_check=False)
    return whole.redistribute(placements=parameter.placements).to_local()


def _as_gradient(part: Tensor, parameter: nn.Parameter) -> Tensor:
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    size, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=size, stride=stride)
