"""Whether ghost and backpropagation clipping fine-tune to the same weights, given the same noise.

    python benchmarks/sst2_equality.py full --steps 5 --batch-size 128

Both draw noise of one law, but in another order, so the same seed gives other numbers. Here the
noise is drawn as Opacus does, for one parameter after the other, and what is left is rounding.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from opacus.optimizers.optimizer import _generate_noise
from torch import Tensor

from opacus_bpclip.ab import training
from opacus_bpclip.ab.batches import Batch
from opacus_bpclip.ab.job import plan_for
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.task import Task, task_of
from opacus_bpclip.jobs.quiet import known_warnings_silenced

ADDS_NOISE = "opacus_bpclip.optimizer.optimizer.add_noise_"


def add_noise_as_opacus(gradients: Any, *, std: float, generator: Any, secure_mode: bool) -> None:
    for gradient in gradients:
        gradient += _generate_noise(std, gradient, generator, secure_mode)


def weights(arm: str, settings: Settings, task: Task, steps: int) -> tuple[Tensor, Tensor]:
    """Return an arm's weights before training and after some steps."""
    with known_warnings_silenced(), mock.patch(ADDS_NOISE, add_noise_as_opacus):
        started = training.start(arm, settings.seeds[0], settings, plan_for(settings, task), task)
        before, taken = _flat(started.model), 0
        with started.batches() as batches:
            for each in batches:
                training.step(started, Batch.of(each, started.device))
                taken += not started.in_step
                if taken == steps:
                    break
        return before, _flat(started.model)


def _flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=("full", "lora", "head"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args()
    settings = Settings(
        model=f"sst2:{args.model}",
        data="sst2:data",
        arms=("ghost", "backprop"),
        seeds=(0,),
        epochs=1,
        batch_size=args.batch_size,
        physical_batch_size=32,
        optimizer="Adam",
        lr=args.lr,
        threads=1,
    )
    torch.set_num_threads(settings.threads)
    task = task_of(settings)
    before, ghost = weights("ghost", settings, task, args.steps)
    _, backprop = weights("backprop", settings, task, args.steps)
    moved, apart = (ghost - before).norm(), (backprop - ghost).norm()
    print(f"{args.model}: after {args.steps} steps ghost is {moved:.3g} from the start, and")
    print(f"backprop {apart:.3g} from ghost: {apart / moved:.1e} of that")


if __name__ == "__main__":
    main()
