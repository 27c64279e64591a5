"""Lightning's strategy for a copy of the model on each process, without torch's wrapper."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import nn


class Replicas(DDPStrategy):
    """A copy of the model on each process; the private optimizer adds up the processes' sums.

    Lightning would wrap the module, and send each training step through the wrapper's ``forward``.
    """

    def configure_ddp(self) -> None:
        """Make the copies of the whole module equal, what is not trained included.

        The module itself stays as it is.
        """
        for tensor in chain(self.model.parameters(), self.model.buffers()):
            dist.broadcast(tensor.data, src=0)


def replicated(model: nn.Module, processes: int) -> Any:
    """Return the model as `make_private` expects it: wrapped, if there are several processes."""
    if processes == 1:
        return model
    return DifferentiallyPrivateDistributedDataParallel(model)
