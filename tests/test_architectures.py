"""Whole architectures that people train, within the bound through the real engine."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from opacus_bpclip import BackpropClipping, PrivacyEngine
from tests.checks import Trainer, check_sensitivity
from tests.strategies import BOUNDS


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, 16, padding_idx=0), nn.Embedding(12, 16)
        self.block = TransformerBlock(16, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        # The positions are expanded: the embedding must see one row for each example.
        steps = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.head(self.block(self.tokens(ids) + self.positions(steps)).mean(1))


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_transformer_over_tokens_stays_within_its_sensitivity(bound):
    torch.manual_seed(0)
    trainer = Trainer(TextClassifier(), (12,), BackpropClipping(bound=bound))
    ids = torch.randint(50, (5, 12))
    check_sensitivity(trainer, ids, torch.randn(5, 3, dtype=torch.float64) * 100)


@pytest.mark.parametrize("bound", BOUNDS)
def test_resnet18_with_group_norm_stays_within_its_sensitivity(bound):
    torch.manual_seed(0)
    model = PrivacyEngine.get_compatible_module(torchvision.models.resnet18(num_classes=3))
    trainer = Trainer(model, (3, 32, 32), BackpropClipping(bound=bound), expected_batch_size=2)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    check_sensitivity(trainer, x, torch.randn(3, 3, dtype=torch.float64) * 100)


def test_a_frozen_backbone_trains_its_head_alone():
    torch.manual_seed(0)
    model = PrivacyEngine.get_compatible_module(torchvision.models.resnet18(num_classes=3))
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    trainer = Trainer(model, (3, 32, 32), BackpropClipping(), expected_batch_size=2)
    assert list(trainer.optimizer.layer_sensitivities) == ["fc"]
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    check_sensitivity(trainer, x, torch.randn(3, 3, dtype=torch.float64) * 100)
    assert not any(
        module._forward_hooks for module in model.modules() if module not in (model, model.fc)
    )
