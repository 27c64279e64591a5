"""Parts of models that call functions on parameters, each from ``[B, T, D]`` to the same shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

T, D = 3, 4


def drawn(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Part(nn.Module):
    """A part with parameters, and how it computes with them.

    Args:
        compute: called with the part and its input.
        parameters: by name.
        parts: modules inside, by name.
    """

    def __init__(
        self,
        compute: Callable[[Part, Tensor], Tensor],
        parameters: dict[str, nn.Parameter] | None = None,
        **parts: nn.Module,
    ) -> None:
        super().__init__()
        self.compute = compute
        for name, parameter in (parameters or {}).items():
            self.register_parameter(name, parameter)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def root_mean_square(s: Part, x: Tensor) -> Tensor:
    return (1 + s.w) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3))


def class_token(s: Part, x: Tensor) -> Tensor:
    x = torch.cat([s.token.expand(len(x), -1, -1), x], dim=1) + s.table[:, : T + 1]
    return x[:, 1:] + x[:, :1]


def positions(s: Part, x: Tensor) -> Tensor:
    return x + s.table(torch.arange(x.shape[1], device=x.device))


def relative_bias(s: Part, x: Tensor) -> Tensor:
    steps = torch.arange(T)
    bias = s.table(steps[None] - steps[:, None] + T).permute(2, 0, 1)
    scores = x @ x.transpose(1, 2) + bias
    return scores.softmax(-1) @ s.linear(x)


def scaled_in_place(s: Part, x: Tensor) -> Tensor:
    y = s.linear(x)
    y *= s.w
    y += s.b
    return y


def windows(s: Part, x: Tensor) -> Tensor:
    # Two windows of an example side by side in the batch.
    y = x.reshape(-1, T, D // 2, 2).transpose(1, 2).reshape(-1, T, 2)
    y = torch.tanh(s.inner(y) * s.w)
    return y.reshape(len(x), D // 2, T, 2).transpose(1, 2).reshape(x.shape)


def strided(s: Part, x: Tensor) -> Tensor:
    # All examples' first halves, then all second halves.
    y = torch.cat([x[..., : D // 2], x[..., D // 2 :]], dim=0)
    y = s.inner(y) + s.w
    return torch.cat(y.chunk(2, dim=0), dim=-1)


def sequence_first(s: Part, x: Tensor) -> Tensor:
    return s.norm(s.linear(x.transpose(0, 1))).transpose(0, 1)


def tied(s: Part, x: Tensor) -> Tensor:
    return s.linear(x) + F.linear(torch.tanh(x), s.linear.weight.t())


def standardised(s: Part, x: Tensor) -> Tensor:
    weight = s.w - s.w.mean(dim=(1, 2), keepdim=True)
    return F.conv1d(x.transpose(1, 2), weight / (weight.std() + 0.1), s.b, padding=1).transpose(
        1, 2
    )


def steps_of_a_cell(s: Part, x: Tensor) -> Tensor:
    hidden = cell = x.new_zeros(len(x), D)
    out = []
    for step in range(x.shape[1]):
        hidden, cell = s.cell(x[:, step], (hidden, cell))
        out.append(hidden)
    return torch.stack(out, dim=1)


def gated(s: Part, x: Tensor) -> Tensor:
    gate = torch.sigmoid(s.temperature.exp() * x)
    return torch.where(x > 0, gate * x, s.w)


def contracted(s: Part, x: Tensor) -> Tensor:
    return torch.einsum("btd,hde->bte", x, s.w) / 2 + x


def listed(s: Part, x: Tensor) -> Tensor:
    for one, other in zip(s.ones, s.others, strict=True):
        x = x * (x @ one)[..., None].tanh() + other
    return x


def unbound(s: Part, x: Tensor) -> Tensor:
    scale, shift = (s.w.sigmoid() * s.b).unbind(0)
    return torch.addcmul(shift, x, scale)


def memory(s: Part, x: Tensor) -> Tensor:
    # One parameter, two arguments.
    kept = s.w.expand(len(x), -1, -1)
    return F.scaled_dot_product_attention(x, kept, kept) + torch.addcmul(s.b, x, s.b)


def broadcast(s: Part, x: Tensor) -> Tensor:
    one, other = torch.broadcast_tensors(x, s.w)
    return one * other


def filled(s: Part, x: Tensor) -> Tensor:
    weight = torch.zeros(D, D, dtype=x.dtype)
    weight[:2] = s.w
    return F.linear(x, weight, s.b)


def complex_by_real_parts(s: Part, x: Tensor) -> Tensor:
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat([real * s.a - imaginary * s.b, real * s.b + imaginary * s.a], dim=-1)


def two_views(s: Part, x: Tensor) -> Tensor:
    both = torch.cat([x, x.flip(1)])
    both = torch.cat([s.token.expand(len(both), -1, -1), both], dim=1)
    one, other = torch.tanh(both)[:, 1:].chunk(2)
    return one * other + torch.tanh(both[: len(x), :1])


def _list(*shapes: int) -> nn.ParameterList:
    return nn.ParameterList([drawn(size) for size in shapes])


def _orthogonal() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map="cayley")


PARTS: dict[str, Callable[[], nn.Module]] = {
    "root mean square": lambda: Part(root_mean_square, {"w": drawn(D)}),
    "class token": lambda: Part(
        class_token, {"token": drawn(1, 1, D), "table": drawn(1, T + 3, D)}
    ),
    "positions": lambda: Part(positions, table=nn.Embedding(T + 2, D)),
    "relative bias": lambda: Part(
        relative_bias, table=nn.Embedding(2 * T + 1, 1), linear=nn.Linear(D, D)
    ),
    "in place": lambda: Part(
        scaled_in_place, {"w": drawn(D), "b": drawn(1, T, 1)}, linear=nn.Linear(D, D)
    ),
    "windows": lambda: Part(windows, {"w": drawn(2)}, inner=nn.Linear(2, 2)),
    "strided": lambda: Part(strided, {"w": drawn(T, 1)}, inner=nn.Linear(D // 2, D // 2)),
    "sequence first": lambda: Part(sequence_first, linear=nn.Linear(D, D), norm=nn.LayerNorm(D)),
    "tied": lambda: Part(tied, linear=nn.Linear(D, D)),
    "standardised": lambda: Part(standardised, {"w": drawn(D, D, 3), "b": drawn(D)}),
    "cell": lambda: Part(steps_of_a_cell, cell=nn.LSTMCell(D, D)),
    "gated": lambda: Part(gated, {"temperature": drawn(), "w": drawn(D)}),
    "contracted": lambda: Part(contracted, {"w": drawn(2, D, D)}),
    "listed": lambda: Part(listed, ones=_list(D, D), others=_list(D, 1)),
    "unbound": lambda: Part(unbound, {"w": drawn(2, 1, D), "b": drawn(2, T, 1)}),
    "memory": lambda: Part(memory, {"w": drawn(1, 2, D), "b": drawn(D)}),
    "broadcast": lambda: Part(broadcast, {"w": drawn(D)}),
    "filled": lambda: Part(filled, {"w": drawn(2, D), "b": drawn(D)}),
    "complex": lambda: Part(complex_by_real_parts, {"a": drawn(D // 2), "b": drawn(D // 2)}),
    "two views": lambda: Part(two_views, {"token": drawn(1, 1, D)}),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(D, D)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(D, D)).eval(),
    "orthogonal": _orthogonal,
}


class Stack(nn.Module):
    """Parts one after the other, then a linear layer."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([PARTS[name]() for name in names])
        self.head = nn.Linear(T * D, 2)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.tanh(part(x))
        return self.head(x.flatten(1))


class Twice(nn.Module):
    """One part, used twice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.part = PARTS[name]()
        self.head = nn.Linear(T * D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.part(torch.tanh(self.part(x)))).flatten(1))
