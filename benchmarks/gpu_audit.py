"""The audit's deterministic part on a device: ``python benchmarks/gpu_audit.py --device cuda``.

Neighbours without noise, and the same randomness replayed, for every built-in case under both
budgets. Exit status 1 if anything is violated.
"""

from __future__ import annotations

import argparse
import sys

import torch

from opacus_bpclip import BackpropClipping
from opacus_bpclip.audit import CASES, audit

CLIPPINGS = (
    BackpropClipping(),
    BackpropClipping(allocation="dimension", bound="weighted", max_input_norm=3.0),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--searches", type=int, default=40)
    options = parser.parse_args()
    # A mean is refused where products are rounded, as cuDNN's are by default.
    torch.backends.fp32_precision = "ieee"
    violated = 0
    for name in options.case:
        for clipping in CLIPPINGS:
            label = f"{name}, {clipping.allocation}, {clipping.bound}"
            target = CASES[name].target(label, clipping=clipping, device=options.device)
            verdict = audit(target, trials=0, searches=options.searches)
            print(f"{verdict.target}: {verdict.outcome}", *verdict.violations, flush=True)
            violated += bool(verdict.violations)
    return int(violated > 0)


if __name__ == "__main__":
    sys.exit(main())
