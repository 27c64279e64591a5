"""The process groups in which ranks meet: how they begin, and how they end."""

from __future__ import annotations

import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# The process groups of models that were freed; the next `new_group` ends them.
# Python may free a model at any moment, also while a collective runs. Ending a group waits for the
# group's threads, and these may wait for the interpreter.
_LEFT: list[Any] = []


def new_group() -> Any:
    """Return a group of all ranks of the default one. All of them must call this."""
    while _LEFT:
        with suppress(ValueError):  # The end of the default group has ended this one, too.
            dist.destroy_process_group(_LEFT.pop())
    # On the CPU, so that no meeting waits for an accelerator or mixes with its collectives.
    return dist.new_group(backend="gloo", timeout=_patience())


def end_after(owner: object, group: Any) -> None:
    """Let a group end some time after its owner was freed: each one has threads of its own."""
    weakref.finalize(owner, _LEFT.append, group).atexit = False


def _patience() -> timedelta | None:
    """Return the default group's timeout; ``None`` where torch does not tell."""
    group = dist.distributed_c10d._get_default_group()
    try:
        options = [group._get_backend(device).options for device in group._device_types]
        return max(option._timeout for option in options)
    except (AttributeError, RuntimeError, ValueError):
        return None
