"""What the tests of all integrations share, without any of their libraries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping

CLASSES = 3
NO_TRIALS = BackpropClipping(probe=False)

# RDP's epsilon is found at once; PRV's, the default, takes most of a second.
PRIVACY = {
    "target_delta": 1e-3,
    "noise_multiplier": 1.0,
    "backprop": NO_TRIALS,
    "accountant": "rdp",
}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])
