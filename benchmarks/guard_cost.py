"""What the guard's checks cost: whole private steps with them and without.

    python benchmarks/guard_cost.py --rounds 40

One model takes all steps, so that both kinds find the same memory: in each round one step with the
guard and one without, in alternating order, and a ratio compares the two. Times are CPU seconds of
the process on one thread. Without the guard the gradients are clipped and noised just the same;
nothing is watched.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipOptimizer, BackpropClipping, PrivacyEngine
from opacus_bpclip.ab.models import cnn26k
from opacus_bpclip.clipping import layers
from opacus_bpclip.clipping.node import NodeClip
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.sampling.log import Pass

ALIVE = Pass()
Step = Callable[[], None]


class Transformer(nn.Module):
    """Two blocks over 64 tokens, width 128."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, 128)
        self.blocks = nn.ModuleList(Block(128, 4) for _ in range(2))
        self.head = nn.Linear(128, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def resnet18() -> nn.Module:
    return PrivacyEngine.get_compatible_module(torchvision.models.resnet18(num_classes=10))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "CNN26k, batch 256": (cnn26k, lambda: torch.randn(256, 1, 28, 28)),
    "ResNet-18-GN, batch 8": (resnet18, lambda: torch.randn(8, 3, 32, 32)),
    "transformer, batch 16": (Transformer, lambda: torch.randint(1000, (16, 64))),
}


def make_step(make: Callable[[], nn.Module], x: Tensor) -> tuple[Step, GradientGuard]:
    torch.manual_seed(0)
    model = make()
    y = torch.randint(10, (len(x),))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        backprop=BackpropClipping(),
    )
    assert isinstance(optimizer, BackpropClipOptimizer)

    def step() -> None:
        loader.samples.draw(len(x), ALIVE)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, model._guard


def nothing(*_: object) -> None:
    """Check nothing."""


@contextmanager
def unwatched(guard: GradientGuard) -> Iterator[None]:
    """Have the guard keep the sums and count rows, and neither it nor the layers check anything."""

    def collect(sums: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, total in sums.items():
            guard._watched[parameter].add(total)
        guard.passes.collected = guard.passes.count

    def enter_forward(rows: int) -> None:
        guard._forward += 1
        guard._batch_size = rows

    off: dict[str, Callable[..., Any]] = {
        "collect": collect,
        "enter_forward": enter_forward,
        "enter_layer": lambda layer: True,
        "begin_backward": lambda: partial(guard.passes.begin, guard._forward, guard._batch_size),
        "leave_forward": nothing,
        "require": nothing,
    }
    with ExitStack() as stack:
        for name in ("unknown_parameter", "replaced_parameter"):
            stack.enter_context(patch.object(layers, name, nothing))
        stack.enter_context(patch.object(NodeClip, "check", nothing))
        for name, instead in off.items():
            stack.enter_context(patch.object(guard, name, instead))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # What Opacus says of every run; nothing here protects anybody's data.
    warnings.filterwarnings("ignore", message="Secure RNG turned off")
    print(f"{'model':<24} {'guard / none':>12}  quartiles      {args.rounds} rounds, 1 thread")
    for name, (make, inputs) in CASES.items():
        x = inputs()
        step, guard = make_step(make, x)
        ratios = []
        for index in range(args.rounds + 3):
            seconds = {}
            for on in (True, False) if index % 2 else (False, True):
                with nullcontext() if on else unwatched(guard):
                    start = time.process_time()
                    step()
                    seconds[on] = time.process_time() - start
            if index >= 3:
                ratios.append(seconds[True] / seconds[False])
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:<24} {middle:12.3f}  {low:.3f}..{high:.3f}", flush=True)


if __name__ == "__main__":
    main()
