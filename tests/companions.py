"""Normalisations of constants, batches of many equal examples, and losses that cancel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from opacus_bpclip.replacements import compatible_copy
from tests.budgets import layerwise
from tests.checks import Trainer, joint

CLASSES = 5


class Criterion(nn.Module):
    """A loss of one term for each example, in every reduction.

    Args:
        kind: ``"cross-entropy"``, or the sum of ``"probabilities"`` or of ``"differences"`` from
            the mean, whose gradients are nothing but rounding, or of ``"sines"``.
        scale: of the loss.
        reduction: over the examples.
    """

    def __init__(self, kind: str, *, scale: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.kind, self.scale, self.reduction = kind, scale, reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.kind == "cross-entropy":
            losses = F.cross_entropy(output, target.long().flatten(), reduction="none")
        elif self.kind == "probabilities":
            losses = 1e6 * output.softmax(dim=-1).sum(dim=-1)
        elif self.kind == "differences":
            losses = 1e6 * (output - output.mean(dim=-1, keepdim=True)).sum(dim=-1)
        else:
            losses = output.sin().sum(dim=-1)
        losses = self.scale * losses
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def plain(self, output: Tensor, target: Tensor, reduction: str) -> Tensor:
        """Be a `tests.checks.Loss`."""
        assert reduction == self.reduction
        return self(output, target)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def mixer(channels: int = 16, depth: int = 2) -> nn.Sequential:
    """ConvMixer as `get_compatible_module` leaves it: a group norm of each channel alone."""
    torch.manual_seed(0)

    def activated() -> list[nn.Module]:
        return [nn.GELU(), nn.GroupNorm(channels, channels)]

    layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=4), *activated()]
    for _ in range(depth):
        mixed = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        layers += [Residual(mixed, *activated()), nn.Conv2d(channels, channels, 1), *activated()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    return nn.Sequential(*layers)


def blank_and_one(
    count: int, shape: tuple[int, ...], companion: str = "black"
) -> tuple[Tensor, Tensor]:
    """Return ``count`` equal images and one more, and their class, 0.

    Args:
        count: how many.
        shape: of an image.
        companion: ``"black"``, ``"grey"``, ``"half"`` black and half white, or ``"any"`` image.
    """
    generator = torch.Generator().manual_seed(1)
    image = torch.zeros(1, *shape)
    if companion == "grey":
        image += torch.tensor([0.2, -1.3, 0.7]).view(3, 1, 1)
    elif companion == "half":
        image[..., shape[-1] // 2 :] = 1
    elif companion == "any":
        image = torch.randn(1, *shape, generator=generator)
    one = torch.randn(1, *shape, generator=generator)
    return torch.cat([image.expand(count, *shape), one]), torch.zeros(count + 1, 1)


def check_rounding_is_small(layer: nn.Module, bound: Any) -> None:
    """A layer's gradient that is nothing but rounding error contributes almost nothing.

    Every position's part is far above the limit, and all of them cancel but for some units of the
    last place.

    Args:
        layer: takes ``[B, 2, 64]``.
        bound: of `BackpropClipping`.
    """
    g = torch.full((2, 64), 1e9)
    g[:, 32:] *= -(1 - 2 * torch.finfo(torch.float32).eps)
    trainer = Trainer(layer, (2, 64), layerwise(bound=bound), dtype=torch.float32)
    norm = joint(trainer.released(torch.ones(1, 2, 64), g.view(1, -1))).norm()
    assert norm <= 1e-4, f"rounding contributes {norm}"


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """Convolutional models of every normalisation, and the size of their images."""
    torch.manual_seed(draw(st.integers(0, 999)))
    channels, size = draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 7, 8]))
    norms: list[Any] = [
        lambda: nn.GroupNorm(channels, channels),
        lambda: nn.GroupNorm(2, channels),
        lambda: nn.GroupNorm(1, channels),
        lambda: nn.GroupNorm(channels, channels, affine=False),
        lambda: nn.InstanceNorm2d(channels),
        lambda: nn.InstanceNorm2d(channels, affine=True),
        lambda: nn.LayerNorm(size),
    ]

    def norm() -> nn.Module:
        made: nn.Module = draw(st.sampled_from(norms))()
        return made

    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), norm()]
    for _ in range(draw(st.integers(1, 4))):
        kernel = draw(st.sampled_from([1, 3]))
        block = [
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2),
            draw(st.sampled_from([nn.GELU, nn.ReLU, nn.Tanh]))(),
            norm(),
        ]
        layers += [Residual(*block)] if draw(st.booleans()) else block
    pooled = draw(st.sampled_from([1, 2]))
    features = channels * pooled**2
    layers += [nn.AdaptiveAvgPool2d(pooled), nn.Flatten()]
    if draw(st.booleans()):
        layers += [nn.LayerNorm(features)]
    return nn.Sequential(*layers, nn.Linear(features, CLASSES)), size


class Attending(nn.Module):
    """Attention that saturates where inputs are not normalised."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(6, 16), attention, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if isinstance(self.attention, nn.TransformerEncoderLayer):
            x = self.attention(x)
        else:
            normed = F.layer_norm(x, x.shape[-1:])
            x = F.layer_norm(x + self.attention(x, x, normed)[0], x.shape[-1:])
        return self.last(x.mean(dim=1))


def check_attention(
    kind: type[nn.Module], scale: float, count: int, *, alike: bool, reduction: str
) -> None:
    """Check that one example moves the sum of an attention's gradients by at most its sensitivity.

    Args:
        kind: ``nn.MultiheadAttention``, or ``nn.TransformerEncoderLayer``, which wants no weights.
        scale: of the inputs; a large one makes one key have all the attention.
        count: how many other examples there are.
        alike: whether they are equal.
        reduction: of the loss, whose mean the package does not see.
    """
    torch.manual_seed(0)
    layer = (
        kind(16, 2, batch_first=True)
        if kind is nn.MultiheadAttention
        else kind(16, 2, 32, 0.0, batch_first=True)
    )

    def loss(output: Tensor, target: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(output, target, reduction=reduction)

    model = compatible_copy(Attending(layer))
    trainer = Trainer(
        model, (8, 6), BackpropClipping(), loss=loss, reduction=reduction, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    x = scale * torch.randn(count + 1, 8, 6, generator=generator)
    target = torch.randint(4, (count + 1,), generator=generator)
    if alike:
        x[:-1], target[:-1] = x[0].clone(), target[0].clone()
    with_z, without_z = (joint(trainer.released(x[:k], target[:k])) for k in (count + 1, count))
    moved = (with_z.double() - without_z.double()).norm()
    assert moved <= 1.002, f"one example moved the sum by {moved}"
