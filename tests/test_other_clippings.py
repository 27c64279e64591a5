"""Every other clipping is stock Opacus to the last bit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import opacus
import pytest
import torch
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPPerLayerOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyEngine
from tests.helpers import SEARCHES_FOR_NOISE, dataset, flat, mlp

SGD = torch.optim.SGD


@dataclass(frozen=True)
class Stock:
    optimizer: type
    options: dict[str, Any] = field(default_factory=dict)


OTHERS = {
    "flat": Stock(DPOptimizer, {"clipping": "flat", "max_grad_norm": 1.0}),
    "unwrapped": Stock(
        DPOptimizer, {"clipping": "flat", "max_grad_norm": 1.0, "wrap_model": False}
    ),
    "per_layer": Stock(DPPerLayerOptimizer, {"clipping": "per_layer", "max_grad_norm": [1.0] * 4}),
    "adaptive": Stock(
        AdaClipDPOptimizer,
        {
            "clipping": "adaptive",
            "max_grad_norm": 1.0,
            "target_unclipped_quantile": 0.5,
            "clipbound_learning_rate": 0.2,
            "max_clipbound": 10.0,
            "min_clipbound": 0.01,
            "unclipped_num_std": 5.0,
        },
    ),
    "ghost": Stock(
        DPOptimizerFastGradientClipping,
        {"clipping": "flat", "max_grad_norm": 1.0, "grad_sample_mode": "ghost"},
    ),
    "default": Stock(DPOptimizer, {"max_grad_norm": 1.0}),
}


def train_with(engine_type: type, method: str, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(11)
    engine = engine_type(accountant="gdp")
    model = mlp()
    common = {
        "module": model,
        "optimizer": SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(dataset(), batch_size=8),
    }
    if method == "make_private":
        result = engine.make_private(**common, noise_multiplier=1.0, **options)
    else:
        result = engine.make_private_with_epsilon(
            **common, target_epsilon=4.0, target_delta=1e-5, epochs=1, **options
        )
    handle, optimizer, *rest = result
    called = handle if options.get("wrap_model", True) else model
    criterion = rest[0] if len(rest) == 2 else nn.CrossEntropyLoss()
    for step, (x, y) in enumerate(rest[-1]):
        if step == 2:
            break
        optimizer.zero_grad()
        with warnings.catch_warnings():
            # Opacus's own backward hooks make PyTorch say so about inputs without gradients.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            criterion(called(x), y).backward()
        optimizer.step()
    types = [type(part) for part in result]
    return types, flat(model.parameters()), engine.accountant.history, optimizer.noise_multiplier


@SEARCHES_FOR_NOISE
@pytest.mark.parametrize("method", ["make_private", "make_private_with_epsilon"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_clippings_are_stock_opacus_to_the_last_bit(name: str, method: str) -> None:
    stock = OTHERS[name]
    ours = train_with(PrivacyEngine, method, **stock.options)
    theirs = train_with(opacus.PrivacyEngine, method, **stock.options)
    assert ours[0] == theirs[0]
    assert ours[0][1] is stock.optimizer
    assert torch.equal(ours[1], theirs[1])
    assert ours[2:] == theirs[2:]
