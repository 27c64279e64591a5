"""A compiled model gives the eager gradient, right after make_private."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from opacus_bpclip import PrivacyViolationError
from tests.budgets import layerwise
from tests.helpers import (
    CLASSES,
    FEATURES,
    Private,
    backward,
    batch,
    loss_of,
    make_private,
    mlp,
    one_layer,
    summed,
    train_step,
)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # The compiler's own deprecations and hints are not what these tests are about.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


OPTIONS: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True, "dynamic": True}


def compiled(private: Private) -> Private:
    return private._replace(model=torch.compile(private.model, **OPTIONS))


def check_compiled(
    make: Callable[[], nn.Module], options: dict[str, Any], **tolerance: float
) -> None:
    eager, fast = (make_private(make(), **options) for _ in range(2))
    fast = compiled(fast)
    counters.clear()
    for size in (6, 4):
        train_step(eager, size)
        train_step(fast, size)
        torch.testing.assert_close(summed(fast), summed(eager), **tolerance)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("bound", "wrap_model"), [("product", True), ("weighted", False), ("exact", True)]
)
def test_a_compiled_model_gives_the_eager_gradient(bound: Any, wrap_model: bool) -> None:
    options = {"backprop": layerwise(bound=bound), "wrap_model": wrap_model}
    check_compiled(mlp, options)


def every_node() -> nn.Sequential:
    """Layers of every kind that a node stands for, positions enough for the exact bound's own
    gradients, and normalisations without trainable parameters."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)),
        nn.Conv1d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.Tanh(),
        nn.Conv1d(8, 8, 1, groups=2),
        nn.GroupNorm(2, 8, affine=False),
        nn.InstanceNorm1d(8),
        nn.LayerNorm(FEATURES),
        nn.Linear(FEATURES, 4),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.RMSNorm(4),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "bound",
    [*(pytest.param(bound, marks=pytest.mark.slow) for bound in ("product", "weighted")), "exact"],
)
def test_every_node_compiles(bound: Any) -> None:
    options = {"backprop": layerwise(bound=bound)}
    check_compiled(every_node, options, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_follows_max_grad_norm() -> None:
    private = make_private(one_layer(), backprop=layerwise(normalize=True, stability=1e-30))
    fast = compiled(private)
    for norm in (1.0, 0.01, 2.0):
        fast.optimizer.zero_grad()
        fast.optimizer.max_grad_norm = norm
        backward(fast, size=1)
        fast.optimizer.step()
        assert 0.99 * norm < summed(fast).norm() <= norm


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_still_refuses_accumulation() -> None:
    private = make_private(one_layer())
    fast = compiled(private)
    fast.optimizer.zero_grad()
    backward(fast)
    with pytest.raises(PrivacyViolationError, match="not compatible with grad accumulation"):
        backward(fast)


@pytest.mark.usefixtures("fresh_compiler")
def test_an_eager_batch_after_a_compiled_one_is_checked_like_any_other() -> None:
    private = make_private(one_layer())
    train_step(compiled(private))
    private.optimizer.zero_grad()
    loss = loss_of(private.model, *batch()) + 1e4 * private.parameters[0].sum()
    with pytest.raises(PrivacyViolationError, match="got gradient from outside its layer's call"):
        loss.backward()
    private.optimizer.zero_grad()
    with pytest.raises(PrivacyViolationError, match="got gradient from outside its layer's call"):
        (1e4 * private.parameters[0].sum()).backward()
