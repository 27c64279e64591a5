"""Whole architectures that people train: three steps of each through the real engine.

Dropout is off where a model has it: the bound is measured by taking one example out, and the others
would draw other masks.
"""

import pytest
import torch
import torchvision
import transformers
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn import functional as F

from opacus_bpclip import PrivacyEngine
from tests.budgets import layerwise
from tests.checks import Trainer, check_sensitivity, check_training
from tests.followed import check_followed
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
    trainer = Trainer(TextClassifier(), (12,), layerwise(bound=bound), probe=True)
    ids = torch.randint(50, (5, 12))
    check_training(trainer, ids, torch.randn(5, 3, dtype=torch.float64) * 100)


@pytest.mark.parametrize(
    "bound",
    [
        bound if bound == "exact" else pytest.param(bound, marks=pytest.mark.slow)
        for bound in BOUNDS
    ],
)
def test_resnet18_with_group_norm_stays_within_its_sensitivity(bound):
    torch.manual_seed(0)
    model = PrivacyEngine.get_compatible_module(torchvision.models.resnet18(num_classes=3))
    trainer = Trainer(model, (3, 16, 16), layerwise(bound=bound), expected_batch_size=2, probe=True)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    check_training(trainer, x, torch.randn(2, 3, dtype=torch.float64) * 100)


def _vision_transformer() -> nn.Module:
    """``vit_b_16`` with fewer and smaller of everything."""
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    model.heads = nn.Linear(16, 3)  # its own starts at zero, and hides every layer below
    return PrivacyEngine.get_compatible_module(model)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_vision_transformer_stays_within_its_sensitivity(bound):
    torch.manual_seed(0)
    trainer = Trainer(_vision_transformer(), (3, 16, 16), layerwise(bound=bound), probe=True)
    assert {"(root)", "encoder"} <= set(trainer.optimizer.layer_sensitivities)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    check_training(trainer, x, torch.randn(4, 3, dtype=torch.float64) * 100)


class Generator(nn.Module):
    """A picture from a learned constant, styled by the input, with noise at each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(1, 8))
        self.styles = nn.ModuleList([nn.Linear(12, 8) for _ in range(3)])
        self.head = nn.Linear(8, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.constant.expand(len(z), -1)
        for style in self.styles:
            x = torch.tanh(x * style(z)) + 0.1 * torch.randn(len(z), 8, dtype=z.dtype)
        return self.head(x)


def test_a_learned_constant_with_noise_at_several_stages_trains():
    torch.manual_seed(0)
    trainer = Trainer(Generator(), (12,), layerwise(bound="exact"), probe=True)
    trainer.step(torch.randn(4, 12, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))
    assert all(p.summed_grad.any() for p in trainer.plain.parameters())


class CharacterClassifier(nn.Module):
    """The model of Opacus's character-level example: names by their letters, last state to head."""

    def __init__(self, characters: int = 20, classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 8)
        self.lstm = DPLSTM(8, 10, num_layers=2, batch_first=True)
        self.head = nn.Linear(10, classes)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_character_lstm_stays_within_its_sensitivity(bound):
    torch.manual_seed(0)
    trainer = Trainer(CharacterClassifier(), (7,), layerwise(bound=bound), probe=True)
    ids = torch.randint(20, (4, 7))
    check_training(trainer, ids, torch.randn(4, 3, dtype=torch.float64) * 100)


class HuggingFace(nn.Module):
    """A model of transformers, with positions for each example (see docs/supported-layers.md)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.model(ids, position_ids=positions).logits


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("make", "outputs"), [(_bert, 3), (_gpt2, 8 * 50)], ids=["bert", "gpt2"])
def test_a_hugging_face_model_stays_within_its_sensitivity(make, outputs, bound):
    torch.manual_seed(0)
    trainer = Trainer(HuggingFace(make()), (8,), layerwise(bound=bound), probe=True)
    ids = torch.randint(1, 50, (3, 8))
    check_training(trainer, ids, torch.randn(3, outputs, dtype=torch.float64) * 100)


def test_a_head_tied_to_the_embedding_shares_its_sensitivity():
    trainer = Trainer(HuggingFace(_gpt2()), (8,), layerwise(), probe=True)
    names = set(trainer.optimizer.layer_sensitivities)
    assert "model.transformer.wte" in names
    assert "model.lm_head" not in names


def test_positions_shared_by_the_batch_count_for_each_example():
    class AsItIs(HuggingFace):
        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    torch.manual_seed(0)
    check_followed(lambda: AsItIs(_bert()), torch.randint(1, 50, (3, 8)))


def test_a_frozen_backbone_trains_its_head_alone():
    torch.manual_seed(0)
    model = PrivacyEngine.get_compatible_module(torchvision.models.resnet18(num_classes=3))
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    trainer = Trainer(model, (3, 32, 32), layerwise(), expected_batch_size=2, probe=True)
    assert list(trainer.optimizer.layer_sensitivities) == ["fc"]
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    check_sensitivity(trainer, x, torch.randn(3, 3, dtype=torch.float64) * 100)
    # A frozen normalisation's hook does nothing where no gradient flows.
    assert not any(
        module._forward_hooks
        for module in model.modules()
        if module not in (model, model.fc) and not isinstance(module, nn.GroupNorm)
    )
    assert not model.avgpool(model.layer1(model.conv1(x))).requires_grad
