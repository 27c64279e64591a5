"""Whole training steps of CNN26k, each way of clipping against training without privacy.

    python benchmarks/paired_steps.py --batch-size 256 --rounds 20 --threads 1

Rounds are interleaved in one process: each round takes one step of every arm, and a ratio compares
two steps of the same round. Reported are the median ratio and its quartiles; absolute times say
more about the machine than about the code.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import BackpropClipping, PrivacyEngine
from opacus_bpclip.ab.models import build

ARMS = {
    "non-private": None,
    "backprop, product": {"clipping": "backprop", "backprop": BackpropClipping(bound="product")},
    "backprop, weighted": {"clipping": "backprop", "backprop": BackpropClipping(bound="weighted")},
    "backprop, exact": {"clipping": "backprop", "backprop": BackpropClipping(bound="exact")},
    "flat, hooks": {"clipping": "flat"},
    "flat, ghost": {"clipping": "flat", "grad_sample_mode": "ghost"},
}


def make_step(options: dict | None, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    torch.manual_seed(0)
    model: nn.Module = build("mnist")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    criterion = F.cross_entropy
    if options is not None:
        loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
        model, optimizer, *criteria, _ = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **options,
        )
        criterion = criteria[0] if criteria else criterion

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # What Opacus says of every run; nothing here protects anybody's data.
    warnings.filterwarnings("ignore", message="Secure RNG turned off|Full backward hook")
    x, y = torch.randn(args.batch_size, 1, 28, 28), torch.randint(10, (args.batch_size,))
    steps = {name: make_step(options, x, y) for name, options in ARMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(args.rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index >= 3:
                seconds[name].append(time.perf_counter() - start)
    print(f"batch {args.batch_size}, {args.threads} thread(s), {args.rounds} rounds")
    print(f"{'arm':<20} {'ratio':>6}  quartiles")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["non-private"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:<20} {middle:6.2f}  {low:.2f}..{high:.2f}")


if __name__ == "__main__":
    main()
