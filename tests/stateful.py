"""Models whose forward pass leaves something in a buffer for the next one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import CLASSES, FEATURES


class Remembering(nn.Module):
    """A layer, and a buffer that a forward pass in training mode may change."""

    def __init__(self, persistent: bool = False, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("kept", torch.zeros(*(shape or (FEATURES,))), persistent=persistent)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))


class Lagged(Remembering):
    """Subtracts the mean of the batch before."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x - self.kept)
        if self.training:
            self.keep(x)
        return y

    @torch.no_grad()
    def keep(self, x: Tensor) -> None:
        self.kept.copy_(x.mean(dim=0))


class Bank(Remembering):
    """Attends to the rows of earlier batches, which it keeps in a ring."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__(persistent, 16, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x + (x @ self.kept.T).softmax(dim=1) @ self.kept)
        if self.training:
            with torch.no_grad():
                at = (self.step + torch.arange(len(x))) % len(self.kept)
                self.kept[at] = x
                self.step += len(x)
        return y


class Hidden(Remembering):
    """A recurrent cell that goes on where the batch before has ended, row by row."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__(persistent, 1, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        before = self.kept if len(self.kept) == len(x) else torch.zeros_like(x)
        now = torch.tanh(x + before)
        if self.training:
            self.kept = now.detach()
        return self.layer(now)


class Weighted(Lagged):
    """Takes an argument that the loader does not have."""

    def forward(self, x: Tensor, *, weight: Tensor) -> Tensor:
        return super().forward(x) * weight[:, None]


class Pair(nn.Module):
    """Two modules side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Lagged(), Running()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


class Rebound(Lagged):
    def keep(self, x: Tensor) -> None:
        self.kept = x.detach().mean(dim=0)


class Delayed(Remembering):
    """Subtracts the mean of the last batch but one."""

    def __init__(self) -> None:
        super().__init__(False, 2, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x - self.kept[0])
        self.kept = torch.stack([self.kept[1], x.detach().mean(dim=0)])
        return y


class Late(Lagged):
    @torch.no_grad()
    def keep(self, x: Tensor) -> None:
        if self.step > 0:
            super().keep(x)
        self.step += 1


class GradientOnly(Lagged):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        scaled = y * (1 + self.kept.sum())
        self.keep(x)
        return y.detach() + (scaled - scaled.detach())


class WithGradients(Lagged):
    def keep(self, x: Tensor) -> None:
        if torch.is_grad_enabled():
            super().keep(x)


class Rare(Lagged):
    def keep(self, x: Tensor) -> None:
        if torch.empty(8).bernoulli_(0.5).sum() < 8:
            super().keep(x)


class Fading(Lagged):
    @torch.no_grad()
    def keep(self, x: Tensor) -> None:
        self.kept.lerp_(x.mean(dim=0), 1e-6)


class Seen(Remembering):
    """Counts its examples, and divides by the number or does not."""

    def __init__(self, read: bool, persistent: bool = False) -> None:
        super().__init__(persistent)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) / (1 + self.kept[0] * self.read)
        self.kept += len(x)
        return y


class LateAttribute(Remembering):
    """Uses an attribute from the third pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        y = self.layer(x - self.last if self.step > 2 else x)
        self.last = x.detach().mean(dim=0)
        return y


class AttributeWithGradients(nn.Module):
    """Subtracts the mean of the batch before, if there was a gradient; ``hold`` keeps it."""

    def __init__(self, hold: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last, self.hold = nn.Linear(FEATURES, CLASSES), torch.zeros(FEATURES), hold

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x - self.last)
        if torch.is_grad_enabled():
            self.hold(self, x.detach().mean(dim=0))
        return y


class Running(Remembering):
    """Keeps a moving average, and uses nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.kept.lerp_(x.detach().mean(dim=0), 0.1)
        return self.layer(x)


class Sixth(Lagged):
    """Keeps a moving average, and subtracts it from the sixth pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        y = self.layer(x - self.kept if self.passes >= 6 else x)
        self.kept.lerp_(x.detach().mean(dim=0), 0.1)
        return y


class Counter(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.layer(x) / self.step


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(FEATURES, CLASSES), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) / self.calls


class Cache(Remembering):
    """A table of positions that is made when it is too short."""

    def __init__(self) -> None:
        super().__init__(False, 1)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.kept) < x.shape[1]:
            self.kept = torch.arange(x.shape[1]).to(x).cos()
        return self.layer(x * self.kept[: x.shape[1]])


class Masks(Remembering):
    """A mask of ones that is made anew when the batch is larger."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__(persistent, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.kept) < len(x):
            self.kept = torch.ones(len(x), 1).to(x)
        return self.layer(x * self.kept[: len(x)])


class Sparse(Remembering):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(FEATURES).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.layer(torch.sparse.mm(self.graph, x.T).T)


class _Keeping(torch.autograd.Function):
    """Adds the mean of the gradient to a tensor in the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, kept: Tensor) -> Tensor:
        ctx.kept = kept
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.kept.add_(gradient.mean())
        return gradient, None


class Backward(Remembering):
    """Keeps the mean of a gradient, in a function of its own, and reads it in the next pass."""

    def forward(self, x: Tensor) -> Tensor:
        return _Keeping.apply(self.layer(x) * (1 + self.kept[0]), self.kept)


class BackwardHook(AttributeWithGradients):
    """Keeps the mean of a gradient in a number, from a hook, and reads it in the next pass."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)
        self.scale = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        if y.requires_grad:
            y.register_hook(self.keep)
        return y, y.detach() * self.scale

    def keep(self, gradient: Tensor) -> None:
        self.scale = 1 + gradient.mean().item()
