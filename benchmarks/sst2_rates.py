"""Choose learning rate and epochs of a comparison on SST-2, each arm by as many trials.

    python benchmarks/sst2_rates.py linear tuning_features --epsilon 1 3 8 --lr 0.01 0.03 0.1 \\
        --epochs 3 10

Trials report on sentences that are held out of the training set, never on the test set. What they
spend is not accounted.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import sst2

from opacus_bpclip import compare

ARMS = ("non-private", "ghost", "backprop", "backprop-layerwise")


def trials(
    model: Any, data: Any, rates: Sequence[float], epochs: Sequence[int], **options: Any
) -> dict[str, dict[tuple[float, int], float]]:
    """Return the accuracy by arm and by (learning rate, epochs)."""
    found: dict[str, dict[tuple[float, int], float]] = {}
    for rate, passes in itertools.product(rates, epochs):
        table = compare(model, data, lr=rate, epochs=passes, **options)
        for row in table.rows:
            assert row.metric is not None, row.note
            found.setdefault(row.arm, {})[rate, passes] = row.metric
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a factory of sst2.py")
    parser.add_argument("data", choices=("tuning_data", "tuning_features"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--epsilon", nargs="+", type=float, required=True)
    parser.add_argument("--lr", nargs="+", type=float, required=True)
    parser.add_argument("--epochs", nargs="+", type=int, required=True)
    parser.add_argument("--optimizer", default="Adam")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--physical-batch-size", type=int)
    args = parser.parse_args()
    for epsilon in args.epsilon:
        found = trials(
            getattr(sst2, args.model),
            getattr(sst2, args.data),
            args.lr,
            args.epochs,
            arms=args.arms,
            epsilon=epsilon,
            seeds=[0],
            optimizer=args.optimizer,
            batch_size=args.batch_size,
            physical_batch_size=args.physical_batch_size,
            threads=1,
        )
        for arm, accuracies in found.items():
            rate, passes = max(accuracies, key=lambda trial: accuracies[trial])
            tried = ", ".join(f"{lr:g}/{n}: {100 * own:.2f}" for (lr, n), own in accuracies.items())
            print(f"epsilon {epsilon:g} {arm}: lr {rate:g}, {passes} epochs ({tried})", flush=True)


if __name__ == "__main__":
    main()
