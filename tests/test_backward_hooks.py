"""Between the clip and the parameter, nothing changes a gradient: neither hooks nor detours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.rules import RULES, LinearRule
from tests.helpers import (
    Private,
    Switchable,
    batch,
    flat,
    make_private,
    model_of,
    switchable,
    train_step,
)
from tests.mutants.registry import clipped_around_the_layer


def times_hundred(_: Any, grad_inputs: tuple[Tensor | None, ...], __: Any) -> Any:
    return tuple(None if g is None else g * 100 for g in grad_inputs)


def times_hundred_in_place(_: Any, grad_inputs: tuple[Tensor | None, ...], __: Any) -> None:
    for g in grad_inputs:
        if g is not None:
            g.mul_(100)


OLD_KIND = pytest.mark.filterwarnings("ignore:Using a non-full backward hook")


@pytest.fixture(params=["closed form", "own graph"])
def clips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip by the closed form, and as is done for layers that have none."""
    if request.param == "own graph":
        clipped_around_the_layer(monkeypatch)


@OLD_KIND
@pytest.mark.usefixtures("clips")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", [times_hundred, times_hundred_in_place], ids=["new", "in place"])
def test_a_backward_hook_of_the_old_kind_does_not_reach_the_sum(
    hook: Callable[..., Any], when: str
) -> None:
    # It sat between the clip and the layer, and made one example contribute 100 times its limit.
    plain, model = switchable(), Switchable()
    if when == "before":
        model.head.register_backward_hook(hook)
    private = make_private(model)
    if when == "after":
        model.head.register_backward_hook(hook)
    train_step(plain)
    train_step(private)
    assert torch.equal(sum_of(private, "head"), sum_of(plain, "head"))
    assert 0 < sum_of(private, "body").norm() <= 6 * private.optimizer.layer_sensitivities["body"]


@pytest.mark.usefixtures("clips")
def test_a_hook_on_the_node_does_not_reach_the_sum() -> None:
    plain, private = switchable(), switchable()
    for each in (plain, private):
        output = each.model(batch()[0])
        if each is private:
            output.grad_fn.register_hook(lambda *gradients: times_hundred(None, *gradients))
        output.sum().backward()
        each.optimizer.step()
    assert torch.equal(sum_of(private, "head"), sum_of(plain, "head"))


def sum_of(private: Private, layer: str) -> Tensor:
    own = model_of(private).get_submodule(layer).parameters()
    return flat(p.summed_grad for p in own)


@OLD_KIND
def test_a_backward_hook_of_the_old_kind_that_only_looks_is_left_alone() -> None:
    private, seen = switchable(), []
    model_of(private).head.register_backward_hook(lambda *_: seen.append("backward"))
    train_step(private)
    assert seen == ["backward"]
    assert private.steps == 1


class Caching(nn.Linear):
    """Keeps its output aside, as it was before the clip."""

    def forward(self, x: Tensor) -> Tensor:
        self.cached = super().forward(x)
        return self.cached


@pytest.mark.parametrize(
    "loss_of",
    [
        pytest.param(lambda cached, output: 1e3 * cached.sum(), id="alone"),
        pytest.param(lambda cached, output: 1e3 * cached.sum() + output.sum(), id="beside"),
    ],
)
def test_an_output_that_went_around_the_clip_is_refused(
    loss_of: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, Caching, LinearRule)
    layer = Caching(4, 3)
    private = make_private(nn.Sequential(layer))
    output = private.model(batch(1)[0])
    with pytest.raises(PrivacyViolationError) as refusal:
        loss_of(layer.cached, output).backward()
    assert str(refusal.value) == (
        "0 got a gradient that bypasses the clipping: the layer's forward stores its output, and "
        "the loss uses the stored tensor. Use what the layer returns."
    )
