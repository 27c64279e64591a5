"""Time of a step's noise alone, drawn by one thread and by several: ``python benchmarks/noise.py``.

In interleaved pairs, for the gradients of cases of ``opacus-bpclip bench``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from torch import Tensor

from opacus_bpclip.bench.cases import build
from opacus_bpclip.bench.settings import CASES
from opacus_bpclip.optimizer.noise import add_noise_


def seconds(gradients: list[Tensor], generator: torch.Generator, threads: int) -> float:
    """Return what adding noise takes with so many threads."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    add_noise_(gradients, std=1.0, generator=generator, secure_mode=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", default=["mlp", "text"], choices=list(CASES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    for name in options.case:
        gradients = [torch.zeros_like(p) for p in build(CASES[name]).parameters()]
        pairs = []
        for index in range(options.rounds + 2):
            order = (1, options.threads) if index % 2 else (options.threads, 1)
            taken = {threads: seconds(gradients, generator, threads) for threads in order}
            pairs.append((taken[1], taken[options.threads]))
        one, several = zip(*pairs[2:], strict=True)  # the first pairs allocate
        ratios = sorted(b / a for a, b in zip(one, several, strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"{name}, {sum(g.numel() for g in gradients):,} entries: 1 thread "
            f"{1e3 * statistics.median(one):.2f} ms, {options.threads} threads "
            f"{1e3 * statistics.median(several):.2f} ms, ratio {quartiles[1]:.2f} "
            f"({quartiles[0]:.2f} to {quartiles[2]:.2f})"
        )


if __name__ == "__main__":
    main()
