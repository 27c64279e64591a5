"""Between the clip and the parameter, nothing changes a gradient: neither hooks nor detours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.rules import RULES, LinearRule
from tests.helpers import (
    Switchable,
    assert_refused_until_zero_grad,
    backward,
    batch,
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


ANOTHER_GRADIENT = (
    "{name} got another gradient than the one that was clipped for it: a backward hook changed it "
    "(register_backward_hook, or a hook on grad_fn), or the layer's output went around the clip. "
    "Use register_full_backward_hook, which sees gradients before they are clipped."
)


@pytest.fixture
def around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip around the layers, as is done for those whose gradient has no closed form."""
    clipped_around_the_layer(monkeypatch)


OLD_KIND = pytest.mark.filterwarnings("ignore:Using a non-full backward hook")


@OLD_KIND
@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", [times_hundred, times_hundred_in_place], ids=["new", "in place"])
def test_a_backward_hook_of_the_old_kind_that_changes_the_clipped_gradient_is_refused(
    hook: Callable[..., Any], when: str
) -> None:
    # It sits between the clip and the layer, and made one example contribute 100 times its limit.
    model = Switchable()
    if when == "before":
        model.head.register_backward_hook(hook)
    private = make_private(model)
    if when == "after":
        model.head.register_backward_hook(hook)
    with pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == ANOTHER_GRADIENT.format(name="head")
    model.head._backward_hooks.clear()
    assert_refused_until_zero_grad(private)


@OLD_KIND
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (times_hundred, "head.bias got gradient from outside its layer's call"),
        (times_hundred_in_place, "A hook on head.bias changed its gradient in place"),
    ],
    ids=["new", "in place"],
)
def test_a_backward_hook_of_the_old_kind_that_changes_the_sum_is_refused(
    hook: Callable[..., Any], reason: str, when: str
) -> None:
    # One node clips and multiplies: there is nothing between, but the sum goes by the hook.
    model = Switchable()
    if when == "before":
        model.head.register_backward_hook(hook)
    private = make_private(model)
    if when == "after":
        model.head.register_backward_hook(hook)
    with pytest.raises(PrivacyViolationError, match=f"^{reason}"):
        backward(private)
    model.head._backward_hooks.clear()
    assert_refused_until_zero_grad(private)


def test_a_hook_on_the_node_that_changes_the_sum_is_refused() -> None:
    private = switchable()
    output = private.model(batch()[0])
    output.grad_fn.register_hook(lambda *gradients: times_hundred(None, *gradients))
    with pytest.raises(PrivacyViolationError, match=r"^head\.bias got gradient from outside"):
        output.sum().backward()
    assert_refused_until_zero_grad(private)


@pytest.mark.usefixtures("around")
def test_a_hook_on_the_outputs_node_that_changes_the_clipped_gradient_is_refused() -> None:
    private = switchable()
    output = private.model(batch()[0])
    output.grad_fn.register_hook(lambda *gradients: times_hundred(None, *gradients))
    with pytest.raises(PrivacyViolationError) as refusal:
        output.sum().backward()
    assert str(refusal.value) == ANOTHER_GRADIENT.format(name="head")
    assert_refused_until_zero_grad(private)


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
    assert str(refusal.value) == ANOTHER_GRADIENT.format(name="0")
