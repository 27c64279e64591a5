"""Lightning's strategy for a copy of the model on each process, without torch's wrapper."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn


class Replicas(DDPStrategy):
    """A copy of the model on each process; the private optimizer adds up the processes' sums.

    Lightning would wrap the module, and send each training step through the wrapper's ``forward``.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is: `replicated` makes the copies equal."""


def replicated(model: nn.Module, processes: int) -> Any:
    """Return the model as `make_private` expects it: wrapped, if there are several processes."""
    if processes == 1:
        return model
    return DifferentiallyPrivateDistributedDataParallel(model)
