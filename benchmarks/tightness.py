"""How tight each bound is on random data: the mean of true norm over bound, as a Markdown table.

    python benchmarks/tightness.py

Inputs and upstream gradients are standard normal, the input is clipped to norm 3 as by default, and
the true norm is the exact bound without its slack for rounding (float64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opacus_bpclip.ops import clip_input
from opacus_bpclip.rules import RULES

MAX_NORM = 3.0
EXAMPLES = 256


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(EXAMPLES, *shape, dtype=torch.float64)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(100, (EXAMPLES, *shape))


CASES: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
    "Linear 64 → 32": (nn.Linear(64, 32), normal(64)),
    "Linear 64 → 32, 16 positions": (nn.Linear(64, 32), normal(16, 64)),
    "Linear 64 → 32, 256 positions": (nn.Linear(64, 32), normal(256, 64)),
    "Conv1d 8 → 16, kernel 3": (nn.Conv1d(8, 16, 3), normal(8, 32)),
    "Conv2d 3 → 16, kernel 3": (nn.Conv2d(3, 16, 3), normal(3, 16, 16)),
    "Conv2d 16 → 16, 4 groups": (nn.Conv2d(16, 16, 3, groups=4), normal(16, 8, 8)),
    "Conv3d 2 → 4, kernel 3": (nn.Conv3d(2, 4, 3), normal(2, 8, 8, 8)),
    "Embedding 100 x 32, 16 tokens": (nn.Embedding(100, 32), tokens(16)),
    "Embedding 100 x 32, 256 tokens": (nn.Embedding(100, 32), tokens(256)),
    "LayerNorm 64": (nn.LayerNorm(64), normal(64)),
    "LayerNorm 64, 16 positions": (nn.LayerNorm(64), normal(16, 64)),
    "RMSNorm 64, 16 positions": (nn.RMSNorm(64), normal(16, 64)),
    "GroupNorm 16, 8 x 8": (nn.GroupNorm(4, 16), normal(16, 8, 8)),
    "InstanceNorm2d 16, 8 x 8": (nn.InstanceNorm2d(16, affine=True), normal(16, 8, 8)),
}


def tightness(layer: nn.Module, make_input: Callable[[], Tensor]) -> dict[str, float]:
    layer = layer.double()
    rule = RULES[type(layer)].from_module(layer)
    prepared = clip_input(make_input(), rule, MAX_NORM)
    g = torch.randn_like(layer(prepared.x))
    norms = {
        kind: rule.bound(kind, g, prepared.x, prepared.norms, MAX_NORM)
        for kind in ("product", "weighted", "exact")
    }
    return {kind: float((norms["exact"] / norms[kind]).mean()) for kind in norms}


def main() -> None:
    torch.manual_seed(0)
    print("| layer | rule | product | weighted | exact |\n|---|---|---|---|---|")
    for name, (layer, make_input) in CASES.items():
        ratio = tightness(layer, make_input)
        cells = " | ".join(f"{ratio[kind]:.2f}" for kind in ("product", "weighted", "exact"))
        print(f"| {name} | `{RULES[type(layer)].__name__}` | {cells} |")


if __name__ == "__main__":
    main()
