"""By class of layers: an example that reaches the limit, in every bound and both upstream modes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from opacus.layers.dp_multihead_attention import SequenceBias
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.layers import Bags, BatchSecond, Pair, Steps, Tokens


@dataclass(frozen=True)
class WorstCase:
    """An example of a model whose one trainable layer is of the class.

    Attributes:
        make: the model.
        shape: of one example.
        spikes: by flat position, the entries of the example that are not zero.
        output: the flat position of the upstream gradient's only entry; ``None``: the output that
            answers the spikes most.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    spikes: dict[int, float]
    output: int | None = None

    @property
    def example(self) -> Tensor:
        x = torch.zeros(1, *self.shape, dtype=torch.float64)
        for position, height in self.spikes.items():
            x.view(-1)[position] = height
        return x


def spike_upstream(model: nn.Module, x: Tensor, height: float, place: int | None = None) -> Tensor:
    """Return an upstream gradient with one entry, ``[1, outputs]``.

    Args:
        model: what makes the outputs.
        x: one example.
        height: of the entry.
        place: of the entry; ``None``: at the output that answers the example most.
    """
    with torch.no_grad():
        response = (model(x) - model(torch.zeros_like(x))).flatten(1)
    upstream = torch.zeros_like(response)
    upstream[0, response.abs().argmax() if place is None else place] = height
    return upstream


def _no_memory() -> nn.Module:
    """A recurrent network whose earlier steps get no gradient: only one column counts."""
    model = Steps(2, 3)
    nn.init.zeros_(model.network.cells[0].hh.weight)
    nn.init.ones_(model.network.cells[0].ih.weight)
    return model


SPIKE = {7: 1e4}
WORST_CASES = {
    # One column as large as clipping lets it be, met by one upstream entry.
    nn.Linear: WorstCase(lambda: nn.Linear(5, 3), (4, 5), SPIKE),
    nn.Conv1d: WorstCase(lambda: nn.Conv1d(2, 4, 3, groups=2, padding=1), (2, 7), SPIKE),
    nn.Conv2d: WorstCase(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 5), SPIKE),
    nn.Conv3d: WorstCase(lambda: nn.Conv3d(1, 2, 2, padding="same"), (1, 3, 3, 3), SPIKE),
    Conv1D: WorstCase(lambda: Conv1D(3, 5), (4, 5), SPIKE),
    RNNLinear: WorstCase(_no_memory, (4, 2), {7: 1e4}),
    # One channel as large as clipping lets it be at every pixel that the upstream entry meets.
    nn.ConvTranspose1d: WorstCase(
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2),
        (4, 5),
        dict.fromkeys(range(5), 1e4),
    ),
    nn.ConvTranspose2d: WorstCase(
        lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(1, 2), output_padding=(0, 1)),
        (2, 3, 3),
        dict.fromkeys(range(9), 1e4),
    ),
    nn.ConvTranspose3d: WorstCase(
        lambda: nn.ConvTranspose3d(2, 2, 2, dilation=2),
        (2, 2, 2, 2),
        dict.fromkeys(range(8), 1e4),
    ),
    # Both inputs of one position as large as clipping lets them be.
    nn.Bilinear: WorstCase(lambda: Pair(nn.Bilinear(3, 2, 4)), (3, 5), {6: 1e4, 9: 1e4}),
    # A negative input, met by one upstream entry.
    nn.PReLU: WorstCase(lambda: nn.PReLU(3), (3, 4), {7: -1e4}),
    # The largest value that normalisation can give, met by one upstream entry.
    nn.LayerNorm: WorstCase(lambda: nn.LayerNorm(6), (3, 6), SPIKE),
    nn.RMSNorm: WorstCase(lambda: nn.RMSNorm(6), (3, 6), SPIKE),
    nn.GroupNorm: WorstCase(lambda: nn.GroupNorm(2, 4), (4, 3, 3), SPIKE),
    nn.InstanceNorm1d: WorstCase(lambda: nn.InstanceNorm1d(4, affine=True), (4, 6), SPIKE),
    nn.InstanceNorm2d: WorstCase(lambda: nn.InstanceNorm2d(2, affine=True), (2, 3, 3), SPIKE),
    nn.InstanceNorm3d: WorstCase(lambda: nn.InstanceNorm3d(1, affine=True), (1, 2, 3, 3), SPIKE),
    # Any token, met by one upstream entry.
    nn.Embedding: WorstCase(lambda: Tokens(nn.Embedding(5, 3)), (4,), {}, 7),
    # One token three times: its weights add up.
    nn.EmbeddingBag: WorstCase(
        lambda: Bags(nn.EmbeddingBag(5, 3, mode="sum"), weighted=True),
        (2, 4),
        {0: 1.0, 1: 1.0, 3: 1.0, 4: 1e2, 5: 1e2, 7: 1e2},
    ),
    # An upstream gradient of the added token alone.
    SequenceBias: WorstCase(lambda: BatchSecond(SequenceBias(3)), (4, 3), {}, 13),
}
