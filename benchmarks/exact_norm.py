"""From how many positions on an example's own gradient is cheaper than Gram matrices.

    python benchmarks/exact_norm.py
    python benchmarks/exact_norm.py --allocation dimension

For each layer: the time of its backward pass with Gram matrices over that with own gradients,
median of paired rounds on one thread, and the flops of the Gram matrices for each number of the
gradient, by which `exact_norms.own_is_cheaper` decides. With a joint budget own gradients are kept
until their factors are known, or a further product makes the sum; layers with budgets of their own
add them up as they are made.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, PrivacyEngine
from opacus_bpclip.rules import FusedRule
from opacus_bpclip.rules.exact_norms import own_is_cheaper

BATCH = 32
# An input size and the positions of a sequence, or channels and the sides of an image.
LINEAR = {64: (2, 4, 8, 16), 256: (8, 16, 32, 64), 512: (16, 32, 64, 128), 1024: (32, 64, 128, 256)}
CONV = {64: (4, 8, 16), 128: (4, 8, 16), 256: (4, 8, 16)}


def backward_of(layer: nn.Module, x: Tensor, config: BackpropClipping) -> Callable[[], float]:
    """Return what times one backward pass through the layer, made private."""
    model, optimizer, _ = PrivacyEngine().make_private(
        module=layer,
        optimizer=torch.optim.SGD(layer.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x), batch_size=len(x)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        clipping="backprop",
        backprop=config,
    )

    def seconds() -> float:
        loss = model(x.requires_grad_()).square().mean()
        start = time.perf_counter()
        loss.backward()
        found = time.perf_counter() - start
        optimizer.zero_grad()
        return found

    return seconds


def gram_over_own(layer: nn.Module, x: Tensor, config: BackpropClipping, rounds: int) -> float:
    """Return the median ratio of the two ways' times."""
    seconds = backward_of(layer, x, config)

    def by(own: bool) -> float:
        with patch.object(FusedRule, "sums_own", lambda *_: own):
            return seconds()

    for own in (True, False):
        by(own)
    return median(by(False) / by(True) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="of each layer (default: 15)")
    parser.add_argument("--allocation", default="joint", choices=["joint", "dimension"])
    args = parser.parse_args()
    config = BackpropClipping(allocation=args.allocation, bound="exact")
    torch.set_num_threads(1)
    print("| layer | positions | flops for each number | time, Gram over own | chosen |")
    print("|---|---|---|---|---|")
    cases: list[tuple[str, nn.Module, Tensor, int, int, int]] = []
    for size, lengths in LINEAR.items():
        for length in lengths:
            layer: nn.Module = nn.Linear(size, size)
            x = torch.randn(BATCH, length, size)
            cases.append((f"`Linear({size}, {size})`", layer, x, length, size, size))
    for channels, sides in CONV.items():
        for side in sides:
            layer = nn.Conv2d(channels, channels, 3, padding=1)
            x = torch.randn(BATCH, channels, side, side)
            name = f"`Conv2d({channels}, {channels}, 3)`"
            cases.append((name, layer, x, side * side, channels, channels * 9))
    for name, layer, x, positions, outputs, inputs in cases:
        flops = 2 * positions**2 * (outputs + inputs) / (outputs * inputs)
        chosen = "own" if own_is_cheaper(positions, outputs, inputs) else "Gram"
        ratio = gram_over_own(layer, x, config, args.rounds)
        print(f"| {name} | {positions} | {flops:.1f} | {ratio:.2f} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
