"""Several processes: not supported yet, and so refused rather than left to train apart."""

from __future__ import annotations

import torch.distributed as dist


def several_ranks() -> str | None:
    """Say that this process is one of several in a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    ranks = dist.get_world_size()
    if ranks == 1:
        return None
    return (
        f'The process group has {ranks} ranks, which clipping="backprop" does not support yet: '
        "each rank would sample, add noise and step on its own, and their models would drift apart "
        "while the accountant sees one of them. Train in one process "
        "(torchrun --nproc-per-node 1, or no process group)."
    )
