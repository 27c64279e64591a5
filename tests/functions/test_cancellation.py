"""Gradients that cancel leave rounding errors, which a mean loss changes with the batch size."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer


class Scaled(nn.Module):
    """Normalises, and multiplies with a parameter: the gradient of the sum is zero."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (8,))
        return torch.einsum("bti,j->bti", y, self.w) if self.kind == "einsum" else y * self.w


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["product", "einsum"])
def test_rounding_alone_moves_next_to_nothing(kind, normalize):
    torch.manual_seed(0)
    trainer = Trainer(
        Scaled(kind),
        (4, 8),
        BackpropClipping(normalize=normalize),
        dtype=torch.float32,
        loss=lambda y, *_: 1e6 * y.sum((1, 2)).mean(),
    )
    x = torch.randn(61, 4, 8)
    for count in (16, 32, 61):
        sums = []
        for rows in (x[:count], x[: count - 1]):
            trainer.step(rows, rows)
            sums.append(torch.cat([p.summed_grad.flatten() for p in trainer.plain.parameters()]))
        assert (sums[0] - sums[1]).norm() <= 0.1
