"""Killers of mutants of the layers' rules: the suite's checks, on layers of every other kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from opacus.layers import DPMultiheadAttention
from opacus.layers.dp_multihead_attention import SequenceBias
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.replacements import compatible_copy
from tests.budgets import layerwise
from tests.checks import HUGE, Trainer, check_independence, check_sensitivity, check_silent
from tests.layers import Bags, BatchSecond, Pair


def _saturated(
    model: nn.Module, shape: tuple[int, ...], *, bound: str = "weighted", height: float = HUGE
) -> None:
    """Check the sensitivity on inputs and upstream gradients that all point the same way."""
    torch.manual_seed(0)
    trainer = Trainer(model, shape, layerwise(bound=bound))
    x = torch.full((2, *shape), height, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(x).flatten(1)
    check_sensitivity(trainer, x, torch.full_like(outputs, HUGE))


@contextmanager
def _nothing_refused() -> Iterator[None]:
    """Fail where the guard takes an honest batch for a violation: a rule misread its axes."""
    try:
        yield
    except PrivacyViolationError as error:
        raise AssertionError(f"an honest batch was refused: {error}") from error


def repeated_token_of_a_bag() -> None:
    """Bags of one token, nine times."""
    _saturated(Bags(nn.EmbeddingBag(2, 1, mode="sum")), (2, 9))


def mean_of_a_bag() -> None:
    """The mean of a bag of one token nine times."""
    _saturated(Bags(nn.EmbeddingBag(2, 1, mode="mean")), (2, 9))


def mean_of_a_bag_with_padding() -> None:
    """The mean of a bag of one token five times and padding four times."""
    model = Bags(nn.EmbeddingBag(2, 1, mode="mean", padding_idx=1))
    trainer = Trainer(model, (2, 9), layerwise())
    x = torch.zeros(1, 2, 9, dtype=torch.float64)
    x[:, 0, 5:] = 1
    check_sensitivity(trainer, x, torch.full((1, 1), HUGE, dtype=torch.float64))


def weights_of_a_bag() -> None:
    """Bags of one token nine times, with large weights."""
    _saturated(Bags(nn.EmbeddingBag(2, 1, mode="sum"), weighted=True), (2, 9))


def bags_of_several_lengths() -> None:
    """A bag of two equal tokens and one of eight, in one row with offsets."""
    torch.manual_seed(0)
    model = Bags(nn.EmbeddingBag(2, 1, mode="sum"), offsets=True)
    trainer = Trainer(model, (2, 9), layerwise())
    x = torch.zeros(2, 2, 9, dtype=torch.float64)
    x[:, 0, 0] = torch.tensor([2.0, 8.0])
    target = torch.tensor([[HUGE], [-HUGE]], dtype=torch.float64)
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)


def weight_of_a_bag_that_is_not_finite() -> None:
    """A bag with nan among its weights."""
    model = Bags(nn.EmbeddingBag(2, 1, mode="sum"), weighted=True)
    trainer = Trainer(model, (2, 3), layerwise())
    x = torch.ones(3, 2, 3, dtype=torch.float64)
    x[-1, 1, 0] = float("nan")
    check_silent(trainer, x, torch.ones(3, 1, dtype=torch.float64))


def many_equal_tokens() -> None:
    """One token 20 000 times, in a bag and in a sequence, in float32."""
    count = 20_000
    bag = Trainer(
        Bags(nn.EmbeddingBag(2, 1, mode="sum")), (2, count), layerwise(), dtype=torch.float32
    )
    sequence = Trainer(nn.Embedding(2, 1), (count,), layerwise(), dtype=torch.float32)
    for height in (0.7, 1.1, 3.3):
        check_sensitivity(bag, torch.zeros(1, 2, count), torch.full((1, 1), height))
        ids = torch.zeros(1, count, dtype=torch.long)
        check_sensitivity(sequence, ids, torch.full((1, count), height))


def transposed_convolution() -> None:
    """A transposed convolution of nine pixels whose patches agree."""
    _saturated(nn.ConvTranspose2d(1, 1, 2, bias=False), (1, 3, 3))


def transposed_convolution_with_bias() -> None:
    """A transposed convolution with a bias, whose output has four positions to each pixel."""
    _saturated(nn.ConvTranspose2d(1, 1, 2, stride=2), (1, 3, 3), height=1.0)


def transposed_convolution_with_padding() -> None:
    """A transposed convolution whose padding cuts into the first and the last patch."""
    _saturated(nn.ConvTranspose1d(1, 1, 3, stride=2, padding=2, bias=False), (1, 5))


def transposed_convolution_in_groups() -> None:
    """A grouped transposed convolution whose second group has the large pixels."""
    model = nn.ConvTranspose1d(4, 2, 3, groups=2, bias=False)
    trainer = Trainer(model, (4, 5), layerwise(bound="product"))
    x = torch.ones(2, 4, 5, dtype=torch.float64)
    x[:, 2:] = HUGE
    check_sensitivity(trainer, x, torch.full((2, 14), HUGE, dtype=torch.float64))


def pairs_by_product() -> None:
    """A bilinear layer of two large inputs, in the product bound."""
    _saturated(Pair(nn.Bilinear(2, 1, 1, bias=False)), (3, 3), bound="product")


def pairs_by_weighted() -> None:
    """A bilinear layer of two large inputs, in the weighted bound."""
    _saturated(Pair(nn.Bilinear(2, 1, 1, bias=False)), (3, 3))


def negative_inputs_by_weighted() -> None:
    """Nine negative inputs of one slope, in the weighted bound."""
    _saturated(nn.PReLU(), (9,), height=-10.0)


def negative_inputs_by_exact() -> None:
    """Nine negative inputs of one slope, in the exact bound."""
    _saturated(nn.PReLU(), (9,), height=-10.0, bound="exact")


def added_token() -> None:
    """A layer that adds a token, in which all the upstream gradient is; the batch is second."""
    torch.manual_seed(0)
    trainer = Trainer(BatchSecond(SequenceBias(2)), (3, 2), layerwise())
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    target = torch.zeros(5, 4, 2, dtype=torch.float64)
    target[:, -1] = HUGE
    with _nothing_refused():
        check_sensitivity(trainer, x, target.flatten(1))
        check_independence(trainer, x, target.flatten(1))


def transposed_linear() -> None:
    """GPT-2's linear layer with a bias, over small inputs."""
    _saturated(Conv1D(2, 3), (4, 3), height=0.1)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = DPMultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


def attention_with_the_batch_second() -> None:
    """Attention whose batch is second, on as many examples as steps and on fewer."""
    torch.manual_seed(0)
    trainer = Trainer(Attends(), (3, 4), layerwise())
    # The whole batch has as many examples as steps: there, sizes cannot tell the axes apart.
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    x[-1] *= 100
    with _nothing_refused():
        check_sensitivity(trainer, x, torch.randn(3, 12, dtype=torch.float64) * 100)
        check_independence(trainer, x, torch.randn(3, 12, dtype=torch.float64) * 100)


class Encodes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = compatible_copy(nn.TransformerEncoderLayer(4, 2, 8, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def transformer_with_the_batch_second() -> None:
    """PyTorch's transformer, whose batch is second, on as many examples as steps and on fewer."""
    torch.manual_seed(0)
    trainer = Trainer(Encodes(), (3, 4), layerwise())
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    with _nothing_refused():
        check_sensitivity(trainer, x, torch.randn(3, 12, dtype=torch.float64) * 100)
        check_independence(trainer, x, torch.randn(3, 12, dtype=torch.float64) * 100)
