"""Does whitening before clipping help? Columns and upstream gradients, by what public noise shows.

    python benchmarks/whitening.py --dataset digits --arms none in+out --lrs 1 2 4 --seeds 1000 1001
    python benchmarks/whitening.py --dataset mnist --data-root data --arms none in+out --lrs 8
    python benchmarks/whitening.py --dataset mnist --data-root data --arms none in0.25 --lrs 80 \
        --max-grad-norm 0.1 --judge test --seeds 0 1 2 3 4

Each line of the output is one training: its accuracy, and how many examples were clipped.
An experiment of its own, not the package: it computes each example's gradient of each layer.

A layer's gradient of one example is the sum over positions of g u^T (u: input columns with a 1 for
the bias, [P, D]; g: upstream gradients, [P, O]). Here it becomes the sum of g' u'^T, with
u' = (A + lambda I)^-p u and g' = (G + lambda I)^-q g. A and G are the means of u u^T and g g^T on
pink noise with random labels, divided by their mean eigenvalue. They see no data, so the clipped
sum of what is whitened has the sensitivity --max-grad-norm, as without whitening.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import random_split

from opacus_bpclip.ab import data, models
from opacus_bpclip.ab.averaging import WeightAverage
from opacus_bpclip.ab.privacy import noise_multiplier_for
from opacus_bpclip.ab.settings import Settings

MAX_INPUT_NORM, LAMBDA = 3.0, 1e-3
PROBES, REFRESHED_EVERY, CHUNK = 512, 20, 64


@dataclass(frozen=True)
class Arm:
    """What is whitened. ``natural``: multiply what is released by the same two matrices again.

    ``metric``: clip inputs by their columns' norm after whitening. ``real``: probe with training
    examples in place of noise. That is not private, and shows what the best probe could give.
    """

    p: float = 0.0
    q: float = 0.0
    natural: bool = False
    metric: bool = False
    real: bool = False


ARMS = {
    "none": Arm(),
    "in": Arm(p=0.5),
    "out": Arm(q=0.5),
    "in+out": Arm(p=0.5, q=0.5),
    "in0.4+out": Arm(p=0.4, q=0.5),
    "in0.25": Arm(p=0.25),
    "in0.4": Arm(p=0.4),
    "in-metric": Arm(p=0.5, metric=True),
    "in+out-metric": Arm(p=0.5, q=0.5, metric=True),
    "in-natural": Arm(p=0.5, natural=True),
    "in+out-natural": Arm(p=0.5, q=0.5, natural=True),
    "in-real": Arm(p=0.5, real=True),
    "out-real": Arm(q=0.5, real=True),
    "in+out-real": Arm(p=0.5, q=0.5, real=True),
    "in+out-natural-real": Arm(p=0.5, q=0.5, natural=True, real=True),
}


class Whitening(NamedTuple):
    """The matrices of a layer: of columns, [D, D], and outputs, [O, O]; None is the identity."""

    columns: Tensor | None = None
    outputs: Tensor | None = None


class Seen(NamedTuple):
    """What a layer saw: columns [B, P, D] to whiten, the same to learn A of, and its output."""

    columns: Tensor
    learnt: Tensor
    output: Tensor


def times(rows: Tensor, matrix: Tensor | None) -> Tensor:
    return rows if matrix is None else rows @ matrix


def run(model: nn.Sequential, x: Tensor, whitenings: list[Whitening], arm: Arm) -> list[Seen]:
    """Run the model with its layers' inputs clipped, each example by one factor."""
    seen: list[Seen] = []
    for module in model:
        if not isinstance(module, nn.Conv2d | nn.Linear):
            x = module(x)
            continue
        u = x.detach().unsqueeze(1)
        if isinstance(module, nn.Conv2d):
            how = {"padding": module.padding, "stride": module.stride}
            u = F.unfold(x.detach(), module.kernel_size, **how).transpose(1, 2)
        one = torch.ones_like(u[..., :1])
        whole = torch.cat([u, one], 2)
        measured = times(whole, whitenings[len(seen)].columns) if arm.metric else u
        factor = (MAX_INPUT_NORM / measured.norm(dim=2).amax(1)).clamp(max=1)
        clipped = torch.cat([u * factor.view(-1, 1, 1), one], 2)
        x = module(x * factor.view(-1, *[1] * (x.dim() - 1)))
        seen.append(Seen(clipped, whole if arm.metric else clipped, x))
    return seen


def upstream(seen: list[Seen], labels: Tensor) -> list[Tensor]:
    """Return each layer's upstream gradients of the summed loss, [B, P, O]."""
    loss = F.cross_entropy(seen[-1].output, labels, reduction="sum")
    found = torch.autograd.grad(loss, [each.output for each in seen])
    return [g.flatten(2).transpose(1, 2) if g.dim() > 2 else g.unsqueeze(1) for g in found]


def inverse_power(second_moment: Tensor, power: float) -> Tensor | None:
    """Return (M + lambda I)^-power, for M divided by its mean eigenvalue."""
    if not power:
        return None
    values, vectors = torch.linalg.eigh(second_moment.double())
    values = (values / values.mean()).clamp(min=0) + LAMBDA
    return ((vectors * values**-power) @ vectors.T).float()


def renewed(
    model: nn.Sequential, x: Tensor, labels: Tensor, whitenings: list[Whitening], arm: Arm
) -> list[Whitening]:
    seen = run(model, x, whitenings, arm)
    moments = [
        (torch.einsum("bpd,bpe->de", own, own) for own in (each.learnt, g))
        for each, g in zip(seen, upstream(seen, labels), strict=True)
    ]
    return [Whitening(inverse_power(a, arm.p), inverse_power(g, arm.q)) for a, g in moments]


def clipped_sums(
    model: nn.Sequential,
    x: Tensor,
    labels: Tensor,
    whitenings: list[Whitening],
    arm: Arm,
    max_grad_norm: float,
) -> tuple[list[Tensor], Tensor]:
    """Return each layer's sum of whitened gradients, [O, D], and each example's norm before."""
    seen = run(model, x, whitenings, arm)
    each = [
        times(g, own.outputs).transpose(1, 2) @ times(layer.columns, own.columns)
        for own, layer, g in zip(whitenings, seen, upstream(seen, labels), strict=True)
    ]
    norms = torch.stack([own.flatten(1).norm(dim=1) for own in each]).norm(dim=0)
    factors = (max_grad_norm / norms).clamp(max=1)
    return [torch.einsum("b,bod->od", factors, own) for own in each], norms


def pink_noise(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return images with amplitudes of 1/frequency; level and contrast are public constants."""
    height, width = like.shape[-2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (rows**2 + columns**2).sqrt().clamp(min=1 / max(height, width))
    white = torch.randn(count, *like.shape[1:], generator=generator)
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    pink = (pink - pink.mean((1, 2, 3), keepdim=True)) / pink.std((1, 2, 3), keepdim=True)
    # The digits are in [0, 1]; the others are normalised to mean 0 and deviation 1.
    return pink * 0.35 + 0.3 if like.min() >= 0 else pink


multiplier = cache(noise_multiplier_for)


Examples = tuple[Tensor, Tensor]


def examples(settings: Settings, held: float | None) -> tuple[Examples, Examples]:
    """Return those to train on, and the part of them or the test set to judge by."""
    sets = data.digits() if settings.dataset == "digits" else data.mnist(settings.data_root)
    if held is None:
        return sets[0][:], sets[1][:]
    parts = random_split(sets[0], [1 - held, held], generator=torch.Generator().manual_seed(0))
    return tuple(sets[0][list(part.indices)] for part in parts)


def train(
    arm: Arm, lr: float, seed: int, settings: Settings, decay: float, held: float | None
) -> dict:
    """Train once, and judge the averaged weights."""
    (x, labels), (x_judge, labels_judge) = examples(settings, held)
    max_grad_norm = settings.max_grad_norm
    streams = np.random.SeedSequence(seed).generate_state(4).tolist()
    torch.manual_seed(streams[0])
    model = models.digits_cnn() if settings.dataset == "digits" else models.cnn26k()
    layers = [own for own in model if isinstance(own, nn.Conv2d | nn.Linear)]
    draws, noise, public = (torch.Generator().manual_seed(own) for own in streams[1:])
    # As Opacus's loader has it: the expected batch is the divisor.
    in_epoch = math.ceil(len(x) / settings.batch_size)
    rate, steps, expected = 1 / in_epoch, settings.epochs * in_epoch, len(x) / in_epoch
    sigma = multiplier(settings, rate, steps)
    whitenings = [Whitening() for _ in layers]
    average, norms, started = WeightAverage(model, decay), [], time.process_time()
    for step in range(steps):
        if (arm.p or arm.q) and step % REFRESHED_EVERY == 0:
            some = torch.randint(len(x), (PROBES,), generator=public)
            probes = x[some] if arm.real else pink_noise(PROBES, x, public)
            classes = torch.randint(10, (PROBES,), generator=public)
            whitenings = renewed(model, probes, classes, whitenings, arm)
        batch = (torch.rand(len(x), generator=draws) < rate).nonzero()[:, 0]
        sums = [torch.zeros(len(own.weight), own.weight[0].numel() + 1) for own in layers]
        for some in batch.split(CHUNK):
            found, before = clipped_sums(
                model, x[some], labels[some], whitenings, arm, max_grad_norm
            )
            sums = [total + own for total, own in zip(sums, found, strict=True)]
            norms.append(before)
        with torch.no_grad():
            for layer, total, own in zip(layers, sums, whitenings, strict=True):
                deviation = sigma * max_grad_norm
                released = total + deviation * torch.randn(total.shape, generator=noise)
                if arm.natural:
                    released = times(times(released, own.columns).T, own.outputs).T
                moved = -lr / expected * released
                layer.weight += moved[:, :-1].view_as(layer.weight)
                layer.bias += moved[:, -1]
        average.update()
    seconds = time.process_time() - started
    with torch.no_grad(), average.in_place():
        outputs = [run(model, own, whitenings, arm)[-1].output for own in x_judge.split(1000)]
    right = (torch.cat(outputs).argmax(1) == labels_judge).float().mean().item()
    all_norms = torch.cat(norms)
    return {
        "test" if held is None else "held_out": round(100 * right, 2),
        "clipped": round((all_norms > max_grad_norm).float().mean().item(), 3),
        "median_norm": round(all_norms.median().item(), 2),
        "seconds": round(seconds, 1),
        "noise_multiplier": round(sigma, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Whitening before clipping, an experiment.")
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["none", "in+out"])
    parser.add_argument("--lrs", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1000])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--judge", choices=["held-out", "test"], default="held-out")
    asked = parser.parse_args()
    digits = asked.dataset == "digits"
    given = {"epochs": asked.epochs} if asked.epochs else {}
    settings = Settings(
        dataset=asked.dataset,
        data_root=asked.data_root,
        max_grad_norm=asked.max_grad_norm,
        **given,
    )
    decay, held = (0.9, 0.2) if digits else (0.97, 0.1)
    for name in asked.arms:
        for lr in asked.lrs:
            for seed in asked.seeds:
                told = {"dataset": asked.dataset, "epochs": settings.epochs, "arm": name}
                told["max_grad_norm"] = asked.max_grad_norm
                judge = held if asked.judge == "held-out" else None
                found = train(ARMS[name], lr, seed, settings, decay, judge)
                print(json.dumps(told | {"lr": lr, "seed": seed} | found), flush=True)


if __name__ == "__main__":
    main()
