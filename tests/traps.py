"""Shared by the tests of models that train in ordinary PyTorch but would break the guarantee."""

from __future__ import annotations

import pytest
from torch import nn
from torch.utils.data import TensorDataset

from opacus_bpclip import CoverageError
from tests.helpers import make_private

HEADER = "Backpropagation clipping cannot bound every trainable parameter of this model:\n- "


def refused_before_training(model: nn.Module, message: str, data: TensorDataset | None = None):
    with pytest.raises(CoverageError) as refusal:
        make_private(model, data=data)
    assert str(refusal.value) == message
