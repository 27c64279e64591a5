"""What tests against flat clipping share."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def batch_of(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, *shape, dtype=dtype)
    with torch.no_grad():
        outputs = model(x).flatten(1).shape[1]
    # Examples of several sizes: some are clipped, some are not.
    rows = torch.tensor([1e-2, 1.0, 30.0, 0.3], dtype=dtype)
    return x, torch.randn(4, outputs, dtype=dtype) * rows[:, None]


KINDS = (
    "linear",
    "transposed linear",
    "conv",
    "grouped conv",
    "reflected conv",
    "conv transpose",
    "layer norm",
    "group norm",
    "prelu",
    "bilinear",
)


# Layers used twice, and tied ones. By plain autograd: Opacus's hooks add the uses of one module up,
# but keep no account of a parameter that two modules share.


class Repeated(nn.Module):
    """Two uses of a layer of each kind, with other shapes of the input where that can be."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(4, 4)
        self.layer = {
            "linear": lambda: nn.Linear(4, 4),
            "transposed linear": lambda: Conv1D(4, 4),
            "conv": lambda: nn.Conv1d(1, 1, 3, padding=1),
            "grouped conv": lambda: nn.Conv1d(4, 4, 1, groups=2),
            "reflected conv": lambda: nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"),
            "conv transpose": lambda: nn.ConvTranspose1d(1, 1, 3, padding=1),
            "layer norm": lambda: nn.LayerNorm(4),
            "group norm": lambda: nn.GroupNorm(2, 4),
            "prelu": lambda: nn.PReLU(),
            "bilinear": lambda: nn.Bilinear(4, 4, 4),
        }[kind]()

    def use(self, x: Tensor) -> Tensor:
        if self.kind == "bilinear":
            return self.layer(x, x + 1)
        if self.kind == "grouped conv":
            return self.layer(x.unsqueeze(2)).squeeze(2)
        if "conv" in self.kind:
            return self.layer(x.unsqueeze(1)).squeeze(1)
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.use(torch.tanh(self.first(x)))
        return torch.cat([self.use(torch.tanh(y)), self.use(x)], dim=1)
