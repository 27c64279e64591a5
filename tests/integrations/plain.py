"""What the tests of all integrations share, without any of their libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
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


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a write end in the middle, and expect its error."""

    def breaks_off(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", breaks_off)
    with pytest.raises(OSError, match="No space left"):
        yield


def check_moved(moved: Tensor, limit: float) -> None:
    """Check that an example moves a step by what is claimed, far below its gradient's norm."""
    assert 0.99 * limit < float(moved.norm()) < 1.01 * limit


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])
