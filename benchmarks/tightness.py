"""How tight each bound is on random data: the mean of true norm over bound, as a Markdown table.

    python benchmarks/tightness.py

Inputs and upstream gradients are standard normal, the input is clipped to norm 3, which the product
bound needs, and the true norm is the exact bound without its slack for rounding (float64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.layers.dp_multihead_attention import SequenceBias
from torch import Tensor, nn

from opacus_bpclip.rules import Inputs, bound_of, registered_kind
from opacus_bpclip.rules.scaling import prepare_inputs

MAX_NORM = 3.0
EXAMPLES = 256

Draw = Callable[[], Tensor]


def normal(*shape: int) -> Draw:
    return lambda: torch.randn(EXAMPLES, *shape, dtype=torch.float64)


def tokens(*shape: int) -> Draw:
    return lambda: torch.randint(100, (EXAMPLES, *shape))


CASES: dict[str, tuple[nn.Module, tuple[Draw, ...]]] = {
    "Linear 64 → 32": (nn.Linear(64, 32), (normal(64),)),
    "Linear 64 → 32, 16 positions": (nn.Linear(64, 32), (normal(16, 64),)),
    "Linear 64 → 32, 256 positions": (nn.Linear(64, 32), (normal(256, 64),)),
    "Bilinear 16 x 16 → 32": (nn.Bilinear(16, 16, 32), (normal(16), normal(16))),
    "Bilinear 16 x 16 → 32, 16 positions": (
        nn.Bilinear(16, 16, 32),
        (normal(16, 16), normal(16, 16)),
    ),
    "Conv1d 8 → 16, kernel 3": (nn.Conv1d(8, 16, 3), (normal(8, 32),)),
    "Conv2d 3 → 16, kernel 3": (nn.Conv2d(3, 16, 3), (normal(3, 16, 16),)),
    "Conv2d 16 → 16, 4 groups": (nn.Conv2d(16, 16, 3, groups=4), (normal(16, 8, 8),)),
    "Conv3d 2 → 4, kernel 3": (nn.Conv3d(2, 4, 3), (normal(2, 8, 8, 8),)),
    "ConvTranspose1d 16 → 8, kernel 4, stride 2": (
        nn.ConvTranspose1d(16, 8, 4, stride=2, padding=1),
        (normal(16, 16),),
    ),
    "ConvTranspose2d 16 → 8, kernel 4, stride 2": (
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1),
        (normal(16, 8, 8),),
    ),
    "ConvTranspose3d 4 → 2, kernel 2, stride 2": (
        nn.ConvTranspose3d(4, 2, 2, stride=2),
        (normal(4, 4, 4, 4),),
    ),
    "Embedding 100 x 32, 16 tokens": (nn.Embedding(100, 32), (tokens(16),)),
    "Embedding 100 x 32, 256 tokens": (nn.Embedding(100, 32), (tokens(256),)),
    "EmbeddingBag 100 x 32, 16 tokens, mean": (nn.EmbeddingBag(100, 32), (tokens(16),)),
    "EmbeddingBag 100 x 32, 16 tokens, max": (nn.EmbeddingBag(100, 32, mode="max"), (tokens(16),)),
    "LayerNorm 64": (nn.LayerNorm(64), (normal(64),)),
    "LayerNorm 64, 16 positions": (nn.LayerNorm(64), (normal(16, 64),)),
    "RMSNorm 64, 16 positions": (nn.RMSNorm(64), (normal(16, 64),)),
    "GroupNorm 16, 8 x 8": (nn.GroupNorm(4, 16), (normal(16, 8, 8),)),
    "InstanceNorm2d 16, 8 x 8": (nn.InstanceNorm2d(16, affine=True), (normal(16, 8, 8),)),
    "PReLU 16, 8 x 8": (nn.PReLU(16), (normal(16, 8, 8),)),
    "SequenceBias 32, 16 tokens": (SequenceBias(32, batch_first=True), (normal(16, 32),)),
}


def tightness(layer: nn.Module, draws: tuple[Draw, ...]) -> tuple[str, dict[str, float]]:
    """Return the name of the layer's rule, and true norm over bound for each kind of bound."""
    layer = layer.double()
    found = registered_kind(type(layer))
    assert found is not None
    rule = found[1].from_module(layer)
    inputs: Inputs = tuple(draw() for draw in draws)
    # What the layer was not called with.
    inputs += (None,) * (rule.arguments - len(inputs))
    clipped = prepare_inputs(inputs, rule, MAX_NORM)
    g = torch.randn_like(layer(*clipped.inputs))
    norms = {
        kind: bound_of(kind).of(rule, g, clipped.inputs, clipped.norms, MAX_NORM)
        for kind in ("product", "weighted", "exact")
    }
    return found[1].__name__, {kind: float((norms["exact"] / norms[kind]).mean()) for kind in norms}


def main() -> None:
    torch.manual_seed(0)
    print("| layer | rule | product | weighted | exact |\n|---|---|---|---|---|")
    for name, (layer, draws) in CASES.items():
        rule, ratio = tightness(layer, draws)
        cells = " | ".join(f"{ratio[kind]:.2f}" for kind in ("product", "weighted", "exact"))
        print(f"| {name} | `{rule}` | {cells} |")


if __name__ == "__main__":
    main()
