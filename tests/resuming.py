"""A training script that is started again with the same seeds, and what it must not draw twice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from opacus_bpclip import PrivacyEngine
from tests.helpers import CLASSES, FEATURES, flat

ITEMS, BATCH = 64, 16


@lru_cache(maxsize=1)
def items() -> TensorDataset:
    """Return items of which each holds its index."""
    x = torch.randn(ITEMS, FEATURES, generator=torch.Generator().manual_seed(2))
    return TensorDataset(x, torch.arange(ITEMS) % CLASSES, torch.arange(ITEMS))


class Script:
    """What a user's script makes after it has set all seeds.

    Args:
        engine: one that it has made before.
        own: whether it passes generators of its own, in place of torch's.
        generators: those of the noise and of the samples.
        data: what it trains on; `items` by default.
        **options: further arguments of ``make_private``.

    Attributes:
        noise: what each step has added, flat.
        samples: the items of each step.
    """

    def __init__(
        self,
        engine: Any = None,
        *,
        own: bool = False,
        generators: Sequence[torch.Generator | None] = (None, None),
        noise_multiplier: float = 1.0,
        data: Dataset[Any] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.engine = engine or PrivacyEngine(accountant="rdp")
        model = nn.Linear(FEATURES, CLASSES)
        if own:
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        self.model, self.optimizer, self.loader = self.engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data or items(), batch_size=BATCH, generator=generators[1]),
            noise_multiplier=noise_multiplier,
            max_grad_norm=1.0,
            clipping="backprop",
            noise_generator=generators[0],
            **options,
        )
        self.noise: list[Tensor] = []
        self.samples: list[list[int]] = []

    @property
    def parts(self) -> dict[str, Any]:
        return {"module": self.model, "optimizer": self.optimizer}

    @property
    def steps(self) -> int:
        return sum(steps for *_, steps in self.engine.accountant.history)

    def train(self, steps: int = 2) -> Script:
        self.optimizer.keep_summed_grad = True
        batches = iter(self.loader)
        for _ in range(steps):
            x, y, places = next(batches)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            noise = (p.grad * BATCH - p.summed_grad for p in self.optimizer.params)
            self.noise.append(flat(noise))
            self.samples.append(places.tolist())
        return self


def check_no_noise_twice(*scripts: Script) -> None:
    """No two steps have the same noise: their difference would have none."""
    for one, other in combinations([noise for script in scripts for noise in script.noise], 2):
        assert (one - other).abs().max() > 1e-3, "the same noise was drawn twice"


def check_no_sample_twice(*scripts: Script) -> None:
    """No two steps have the same sample: the accountant takes them for independent.

    Two independent samples are equal with a probability of 0.625 ** 64, about 1e-13.
    """
    for one, other in combinations([items for script in scripts for items in script.samples], 2):
        assert one != other, "the same sample was drawn twice"
