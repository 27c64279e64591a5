"""Pretrained normalisation layers that are frozen."""

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from opacus_bpclip import PrivacyEngine
from opacus_bpclip.replacements import compatible_copy
from opacus_bpclip.replacements.normalization import FixedBatchNorm
from tests.budgets import layerwise
from tests.checks import Trainer, check_training


class Renamed(nn.BatchNorm2d):
    """Computes what ``nn.BatchNorm2d`` computes."""


def compatible(model: nn.Module) -> nn.Module:
    return PrivacyEngine.get_compatible_module(model, clipping="backprop")


class Backbone(nn.Module):
    """Pretrained, frozen layers, and a head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3), norm).requires_grad_(False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Renamed, nn.SyncBatchNorm, BatchNormAct2d])
def test_a_frozen_one_keeps_its_statistics_for_good(kind):
    norm = kind(16)
    for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(value, 0.5, 2.0)
    model = Backbone(norm)
    made = compatible(model)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(made.train()(x), model.eval()(x))
    kept = made.body[1] if kind is not BatchNormAct2d else made.body[1].norm
    assert isinstance(kept, FixedBatchNorm)
    assert not kept.training
    assert kept.state_dict().keys() == nn.BatchNorm2d(16).state_dict().keys()
    trainer = Trainer(made, (1, 8, 8), layerwise(), probe=True)
    check_training(trainer, x.double(), torch.randn(4, 3, dtype=torch.float64) * 100)
    # Trained again, it is a batch normalisation like any other.
    assert type(compatible_copy(made.requires_grad_(True)).body[1]) is not FixedBatchNorm


def test_in_evaluation_mode_a_frozen_one_stays_as_it_is():
    model = Backbone(nn.BatchNorm2d(16))
    model.body.eval()
    assert type(compatible(model).body[1]) is nn.BatchNorm2d


def test_without_statistics_a_frozen_one_is_replaced_like_others():
    assert type(compatible(Backbone(nn.BatchNorm2d(16, track_running_stats=False))).body[1]) is (
        nn.GroupNorm
    )


@pytest.mark.parametrize(
    "kind", [torchvision.ops.FrozenBatchNorm2d, timm.layers.FrozenBatchNormAct2d]
)
def test_fixed_affine_maps_of_others_are_left_alone_and_train(kind):
    torch.manual_seed(0)
    made = compatible(Backbone(kind(16)))
    assert type(made.body[1]) is kind
    trainer = Trainer(made, (1, 8, 8), layerwise(), probe=True)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    check_training(trainer, x, torch.randn(4, 3, dtype=torch.float64) * 100)
