"""Hooks and patches on the model either leave the bound alone or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.rules import RULES, LinearRule
from tests.budgets import layerwise
from tests.helpers import (
    BOUNDS,
    CLASSES,
    FEATURES,
    ByKeyword,
    Private,
    Switchable,
    assert_refused_until_zero_grad,
    backward,
    batch,
    make_private,
    model_of,
    one_layer,
    summed,
    switchable,
    train_step,
)


def scale_arguments(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0] * 100


def scale_arguments_in_place(_: nn.Module, args: tuple[Tensor, ...]) -> None:
    args[0].detach().mul_(100)


def scale_keyword(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Tensor]) -> Any:
    return args, {"input": kwargs["input"] * 100}


def scale_output(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return y * 100


def scale_grad_of(parameter: nn.Parameter) -> None:
    if parameter.grad is not None:
        parameter.grad.mul_(100)


def scale_without_a_trace(gradient: Tensor) -> None:
    gradient.data.mul_(100)


class TimesHundred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 100


def replace_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: F.linear(x * 100, layer.weight, layer.bias)  # type: ignore


def contributed(private: Private) -> float:
    """Train on one example: return how much it contributed, 0 where the batch was refused."""
    try:
        private.model(batch(1)[0]).sum().backward()
        private.optimizer.step()
    except PrivacyViolationError:
        return 0.0
    return float(summed(private).norm())


@BOUNDS
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "interfere",
    [
        pytest.param(lambda layer: layer.register_forward_pre_hook(scale_arguments), id="pre-hook"),
        pytest.param(
            lambda layer: layer.register_forward_pre_hook(scale_arguments_in_place),
            id="pre-hook in place",
        ),
        pytest.param(
            lambda layer: layer.register_forward_hook(scale_output, prepend=True),
            id="forward hook, prepended",
        ),
        pytest.param(lambda layer: layer.register_forward_hook(scale_output), id="forward hook"),
        pytest.param(
            lambda layer: [p.register_hook(lambda g: g * 100) for p in layer.parameters()],
            id="hook on the parameter",
        ),
        pytest.param(
            lambda layer: [p.register_hook(lambda g: g.mul_(100)) for p in layer.parameters()],
            id="hook on the parameter in place",
        ),
        pytest.param(
            lambda layer: [p.register_hook(scale_without_a_trace) for p in layer.parameters()],
            id="hook on the parameter through .data",
        ),
        pytest.param(
            lambda layer: [
                p.register_post_accumulate_grad_hook(scale_grad_of) for p in layer.parameters()
            ],
            id="hook after accumulation",
        ),
    ],
)
def test_no_hook_makes_one_example_contribute_more_than_the_bound(
    interfere: Callable[[nn.Module], Any], when: str, bound: Any
) -> None:
    model = one_layer()
    if when == "before":
        interfere(model[0])
    private = make_private(model, backprop=layerwise(bound=bound))
    if when == "after":
        interfere(model[0])
    assert contributed(private) <= 1.0


@BOUNDS
@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(replace_forward, id="forward"),
        pytest.param(
            lambda layer: parametrize.register_parametrization(layer, "weight", TimesHundred()),
            id="parametrization",
        ),
    ],
)
def test_a_layer_that_is_patched_later_is_refused_or_still_bounded(
    patch: Callable[[nn.Module], Any], bound: Any
) -> None:
    model = one_layer()
    private = make_private(model, backprop=layerwise(bound=bound))
    patch(model[0])
    assert contributed(private) <= 1.0


def test_a_hook_that_changes_a_keyword_input_after_it_was_measured_is_refused() -> None:
    model = ByKeyword()
    private = make_private(model)
    assert 0 < contributed(private) <= 1.0
    private.optimizer.zero_grad()
    model.layer.register_forward_pre_hook(scale_keyword, with_kwargs=True)
    assert contributed(private) <= 1.0


def test_a_hook_on_every_module_that_changes_the_input_is_measured_with_it() -> None:
    private = make_private(one_layer())
    handle = nn.modules.module.register_module_forward_pre_hook(scale_arguments)
    try:
        assert 0 < contributed(private) <= 1.0
    finally:
        handle.remove()


def test_a_hook_on_every_module_after_forward_is_refused() -> None:
    private = make_private(one_layer())
    handle = nn.modules.module.register_module_forward_hook(scale_output)
    try:
        with pytest.raises(PrivacyViolationError) as refusal:
            backward(private)
    finally:
        handle.remove()
    assert str(refusal.value) == (
        "A forward hook on every module (register_module_forward_hook) may change what a layer "
        "such as 0 returns before it is clipped. Remove the hook."
    )
    assert_refused_until_zero_grad(private)


class Own(nn.Linear):
    """A layer whose inputs are clipped before it runs, since its forward is its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input)


@pytest.fixture
def own_layer(monkeypatch: pytest.MonkeyPatch) -> Own:
    monkeypatch.setitem(RULES, Own, LinearRule)
    torch.manual_seed(1)
    return Own(FEATURES, CLASSES)


@pytest.mark.parametrize("hook", [scale_arguments, scale_arguments_in_place])
def test_a_layer_without_a_closed_form_measures_what_it_used(own_layer: Own, hook: Any) -> None:
    private = make_private(nn.Sequential(own_layer))
    own_layer.register_forward_pre_hook(hook)
    assert 0 < contributed(private) <= 1.0


@pytest.mark.parametrize("hook", [scale_arguments, scale_arguments_in_place])
def test_a_layer_that_measures_what_it_used_may_have_its_input_changed(hook: Any) -> None:
    before, after = one_layer(), one_layer()
    before[0].register_forward_pre_hook(hook)
    changed, same = make_private(before), make_private(after)
    after[0].register_forward_pre_hook(hook)
    for private in (changed, same):
        train_step(private)
    assert 0 < summed(changed).norm() <= 6.0
    assert torch.equal(summed(changed), summed(same))


@pytest.mark.parametrize(
    ("interfere", "message"),
    [
        pytest.param(
            replace_forward,
            "0 was changed after make_private (its forward was replaced, an option was set, or a "
            "parametrization was added): its rule no longer describes it. Change the model first, "
            "then call make_private.",
            id="forward replaced",
        ),
        pytest.param(
            lambda layer: layer.register_forward_hook(scale_output, prepend=True),
            "Another forward hook of 0 runs before the one that clips its upstream gradient. "
            "Register it without prepend=True.",
            id="prepended hook",
        ),
    ],
)
def test_interference_is_refused_by_name(
    interfere: Callable[[nn.Module], Any], message: str
) -> None:
    private = make_private(one_layer())
    interfere(private.handle._module[0])
    with pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == message
    with pytest.raises(PrivacyViolationError, match="not covered by the guarantee"):
        private.optimizer.step()


def test_hooks_that_only_look_are_left_alone() -> None:
    plain, watched = switchable(), switchable()
    seen: list[str] = []
    model_of(watched).head.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model_of(watched).head.register_forward_hook(lambda *_: seen.append("forward"))
    train_step(plain)
    train_step(watched)
    assert torch.equal(summed(plain), summed(watched))
    assert seen == ["pre", "forward"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_full_backward_hooks_that_only_look_are_left_alone(when: str) -> None:
    model, seen = Switchable(), []
    if when == "before":
        model.head.register_full_backward_hook(lambda *_: seen.append("backward"))
    private = make_private(model)
    if when == "after":
        model.head.register_full_backward_hook(lambda *_: seen.append("backward"))
    train_step(private)
    seen.clear()  # the model was tried on made-up examples, too
    train_step(private)
    assert seen == ["backward"]
