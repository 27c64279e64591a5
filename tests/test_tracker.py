"""Questions from Opacus's tracker that this method settles, and had no test elsewhere.

``docs/tracker.md`` lists them all, with the test that answers each.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import PrivacyEngine
from tests.budgets import layerwise
from tests.checks import Trainer, check_training
from tests.helpers import make_private
from tests.strategies import BOUNDS
from tests.test_architectures import _bert


class LowRank(nn.Module):
    """A frozen layer and a trained pair beside it, the second of which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("bound", BOUNDS)
def test_lora_trains_its_pairs_alone(bound):
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(nn.Linear(4, 8)), nn.Tanh(), LowRank(nn.Linear(8, 3)))
    trainer = Trainer(model, (4,), layerwise(bound=bound), probe=True)
    names = list(trainer.optimizer.layer_sensitivities)
    assert names == ["0.down", "0.up", "2.down", "2.up"]
    x = torch.randn(5, 4, dtype=torch.float64) * 10
    check_training(trainer, x, torch.randn(5, 3, dtype=torch.float64) * 100)
    assert not any(module._forward_hooks for module in (model[0].base, model[2].base))


def test_hugging_face_models_keep_their_type_and_compute_their_own_loss():
    torch.manual_seed(0)
    ids, labels = torch.randint(1, 50, (16, 8)), torch.randint(3, (16,))
    model = _bert()
    private = make_private(
        model,
        data=TensorDataset(ids, labels),
        wrap_model=False,
        noise_multiplier=1.0,
        engine=PrivacyEngine(),
    )
    keys = set(model.state_dict())
    for rows in (slice(0, 5), slice(5, 6), slice(6, 16)):
        private.optimizer.zero_grad()
        positions = torch.arange(8).expand(ids[rows].shape)
        loss = model(ids[rows], position_ids=positions, labels=labels[rows]).loss
        loss.backward()
        private.optimizer.step()
    assert private.steps == 3
    assert set(model.state_dict()) == keys
    assert all(parameter.isfinite().all() for parameter in model.parameters())
