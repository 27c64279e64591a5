"""The published algorithm of 2022, re-enacted: what `opacus-bpclip audit` would have said of it.

A model of what arXiv 2202.05089's code did, written for this package, not taken from it. Each layer
clips its input row to norm ``A`` and its upstream gradient row to norm ``C``, so that one example
adds at most ``A * C`` to the layer's gradient. How much noise that needs is where it went wrong;
``docs/tutorials/2022.md`` tells the story.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip.audit.target import Batch, Target, Trainer

_FEATURES, _CLASSES, _BATCH_SIZE = 8, 2, 64
_INPUT_BOUND = 3.0


def original() -> Target:
    """Return the withdrawn algorithm: the sensitivity is divided by the batch size once more.

    The loss is a mean, so gradients carry ``1/B`` already, and the clip comes after that: a row
    still adds up to ``A * C``. The code took ``A * C / B`` for the sensitivity.
    """
    upstream_bound = 1e-3
    sensitivity = _INPUT_BOUND * upstream_bound / _BATCH_SIZE
    return _target("original", (_FEATURES, _FEATURES, _CLASSES), upstream_bound, sensitivity)


def repaired() -> Target:
    """Return the repaired algorithm: the right sensitivity for sums, the wrong one for means.

    It clips ``g_i / B``, so that every row depends on how many there are. Rows just below the clip
    all shrink when one example joins them.
    """
    upstream_bound = 0.0112
    return _target("repaired", (_FEATURES, _CLASSES), upstream_bound, _INPUT_BOUND * upstream_bound)


class PublishedTrainer(Trainer):
    """A ReLU network without biases, trained by the published algorithm.

    Args:
        widths: of the input, the hidden layers, and the output.
        upstream_bound: ``C``.
        layer_sensitivity: what the code takes for the sensitivity of one layer's gradient.
        noise_multiplier: of the noise, in units of the joint sensitivity of all layers.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        upstream_bound: float,
        layer_sensitivity: float,
        noise_multiplier: float,
    ) -> None:
        pairs = itertools.pairwise(widths)
        self._layers = [nn.Linear(inputs, outputs, bias=False) for inputs, outputs in pairs]
        # Nothing random: hidden layers pass their input on, and classes are equally likely.
        for layer in self._layers[:-1]:
            nn.init.eye_(layer.weight)
        nn.init.zeros_(self._layers[-1].weight)
        self._upstream_bound = upstream_bound
        joint = math.sqrt(len(self._layers)) * layer_sensitivity
        super().__init__(
            [layer.weight for layer in self._layers],
            noise_multiplier=noise_multiplier,
            sensitivity=joint,
        )
        self._optimizer = torch.optim.SGD(self.parameters, lr=0.1)

    def compute(self, batch: Batch) -> None:
        """Run the network on ``[B, features]`` and the mean loss over ``[B]`` classes."""
        self._optimizer.zero_grad()
        h, labels = batch
        for number, layer in enumerate(self._layers):
            h = layer(_clip_rows(torch.relu(h) if number else h, _INPUT_BOUND))
            h.register_hook(partial(_clip_rows, bound=self._upstream_bound))
        F.cross_entropy(h, labels).backward()

    def step(self) -> None:
        """Add noise to the gradients, and step."""
        for p in self.parameters:
            assert p.grad is not None
            p.grad += torch.randn_like(p) * self.noise_multiplier * self.sensitivity
        self._optimizer.step()


def _clip_rows(x: Tensor, bound: float) -> Tensor:
    norms = x.detach().norm(dim=1, keepdim=True)
    return x * (bound / norms.clamp(min=bound))


def _target(
    name: str, widths: tuple[int, ...], upstream_bound: float, layer_sensitivity: float
) -> Target:
    """Return an audit of a crowd of one class, and an example of the other that opposes it."""
    x = torch.ones(1, _FEATURES)
    crowd = (x.repeat(_BATCH_SIZE, 1), torch.zeros(_BATCH_SIZE, dtype=torch.long))
    return Target(
        name=f"published algorithm, {name}",
        make=partial(PublishedTrainer, widths, upstream_bound, layer_sensitivity),
        batches=(crowd,),
        canaries=((x, torch.ones(1, dtype=torch.long)),),
    )
