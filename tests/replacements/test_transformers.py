"""PyTorch's transformers train privately, with their masks, whatever their layout."""

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import CoverageError, PrivacyEngine
from opacus_bpclip.replacements import compatible_copy
from tests.budgets import layerwise
from tests.checks import Trainer, check_training, joint, squared_loss
from tests.followed import check_followed
from tests.helpers import make_private
from tests.replacements.masks import causal, padding
from tests.strategies import BOUNDS

WIDTH, HEADS, STEPS = 4, 2, 3

# PyTorch says so of encoders whose layers it cannot fuse.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


class Encodes(nn.Module):
    """Batch first outside, whatever the transformer has."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, 0.0, batch_first=batch_first)
        self.batch_first = batch_first
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        masks = {"mask": causal(x), "src_key_padding_mask": padding(x)}
        if self.batch_first:
            return self.body(x, **masks)
        return self.body(x.transpose(0, 1), **masks).transpose(0, 1)


class Decodes(Encodes):
    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__(batch_first=batch_first)
        layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 8, 0.0, batch_first=batch_first, norm_first=True
        )
        self.body = nn.TransformerDecoder(layer, 1, nn.LayerNorm(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        masks = {"tgt_mask": causal(x), "memory_key_padding_mask": padding(x)}
        if self.batch_first:
            return self.body(x, x.flip(1), tgt_is_causal=True, **masks)
        x = x.transpose(0, 1)
        return self.body(x, x.flip(0), tgt_is_causal=True, **masks).transpose(0, 1)


class Translates(Encodes):
    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__(batch_first=batch_first)
        self.body = nn.Transformer(WIDTH, HEADS, 1, 1, 8, 0.0, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        masks = {"tgt_mask": causal(x), "src_key_padding_mask": padding(x)}
        if self.batch_first:
            return self.body(x, x.flip(1), **masks)
        x = x.transpose(0, 1)
        return self.body(x, x.flip(0), **masks).transpose(0, 1)


TRANSFORMERS = pytest.mark.parametrize("kind", [Encodes, Decodes, Translates])
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "second"])


def replaced(kind: type[Encodes], **options) -> nn.Module:
    torch.manual_seed(0)
    return PrivacyEngine.get_compatible_module(kind(**options), clipping="backprop")


@TRANSFORMERS
@LAYOUTS
@pytest.mark.parametrize(
    "bound",
    [b if b == "exact" else pytest.param(b, marks=pytest.mark.slow) for b in BOUNDS],
)
@pytest.mark.parametrize("count", [STEPS, 5])
def test_a_transformer_stays_within_its_sensitivity(kind, batch_first, bound, count):
    model = replaced(kind, batch_first=batch_first)
    trainer = Trainer(model, (STEPS, WIDTH), layerwise(bound=bound), probe=True)
    x = torch.randn(count, STEPS, WIDTH, dtype=torch.float64) * 3
    target = torch.randn(count, STEPS * WIDTH, dtype=torch.float64) * 100
    check_training(trainer, x, target)
    trainer.step(x[:0], target[:0])


@TRANSFORMERS
def test_the_layout_makes_no_difference_to_what_is_released(kind):
    x = torch.randn(4, STEPS, WIDTH, dtype=torch.float64)
    target = torch.randn(4, STEPS * WIDTH, dtype=torch.float64)
    released = []
    for batch_first in (True, False):
        model = replaced(kind, batch_first=batch_first)
        released.append(joint(Trainer(model, x.shape[1:], layerwise()).released(x, target)))
    torch.testing.assert_close(released[0], released[1])


@TRANSFORMERS
def test_without_clipping_the_sum_is_the_gradient_of_what_was_replaced(kind):
    model = replaced(kind)
    torch.manual_seed(0)
    plain = kind().double()
    x = torch.randn(4, STEPS, WIDTH, dtype=torch.float64)
    target = torch.randn(4, STEPS * WIDTH, dtype=torch.float64)
    squared_loss(plain(x), target, "sum").backward()
    clipping = layerwise(bound="exact", max_input_norm=None)
    trainer = Trainer(model, x.shape[1:], clipping, max_grad_norm=1e9, loss=squared_loss)
    trainer.step(x, target)
    for p in model.parameters():
        p.data = p.summed_grad.detach()
    for name, gradient in model.state_dict().items():
        expected = plain.get_parameter(name).grad
        assert torch.allclose(gradient, expected, rtol=1e-7, atol=1e-9), name


class BatchSecond(nn.Module):
    """A model whose own inputs and outputs have the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 8, 0.0), 1)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, is_causal=True, mask=causal(x.transpose(0, 1))))


def test_a_model_with_the_batch_second_trains():
    torch.manual_seed(0)
    model = PrivacyEngine.get_compatible_module(BatchSecond(), clipping="backprop")
    data = torch.utils.data.TensorDataset(torch.randn(32, STEPS, WIDTH))
    private = make_private(model, data=data, batch_first=False, noise_multiplier=0.0)
    for size in (STEPS, 5):
        private.optimizer.zero_grad()
        x = data.tensors[0][:size].transpose(0, 1)
        (100 * private.model(x).sum(dim=(0, 2))).mean().backward()
        private.optimizer.step()
        for name, p in model.named_parameters():
            assert p.summed_grad.norm() <= size * (1 + 1e-5), name
            assert p.summed_grad.norm() > 0 or name.endswith("k_proj.bias"), name


def test_attention_that_was_not_replaced_is_refused_with_the_remedy_which_works():
    model = Encodes()
    data = torch.utils.data.TensorDataset(torch.randn(32, STEPS, WIDTH), torch.zeros(32).long())
    with pytest.raises(CoverageError) as refusal:
        make_private(model, data=data)
    assert (
        "- body.layers.0.self_attn (MultiheadAttention): no rule bounds the gradient of "
        "in_proj_weight, in_proj_bias. "
        'PrivacyEngine.get_compatible_module(model, clipping="backprop") replaces it. '
    ) in str(refusal.value)
    made = PrivacyEngine.get_compatible_module(model, clipping="backprop")
    private = make_private(
        nn.Sequential(made, nn.Flatten(), nn.Linear(STEPS * WIDTH, 3)), data=data
    )
    private.optimizer.zero_grad()
    nn.functional.cross_entropy(private.model(data.tensors[0][:5]), data.tensors[1][:5]).backward()
    private.optimizer.step()
    assert private.steps == 1


@pytest.mark.parametrize("batch_first", [False, True])
def test_in_a_block_of_ones_own_the_examples_are_found_in_either_layout(batch_first):
    class Own(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return super()._ff_block(x)

    def made() -> nn.Module:
        model = Encodes(batch_first=batch_first)
        model.body.layers[0] = Own(WIDTH, HEADS, 8, 0.0, batch_first=batch_first)
        return compatible_copy(model)

    torch.manual_seed(0)
    check_followed(made, torch.randn(5, STEPS, WIDTH, dtype=torch.float64))
