"""From backward to step, gradients are left alone, and batches add up only where they may."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from tests.helpers import (
    CLASSES,
    Private,
    Step,
    Switchable,
    assert_refused_until_zero_grad,
    backward,
    batch,
    loss_of,
    make_private,
    model_of,
    summed,
    switchable,
    train_step,
    tricked,
    values,
)


def assign(private: Private) -> None:
    for p in private.parameters:
        p.grad = torch.full_like(p, 100.0)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda private: nn.utils.clip_grad_norm_(private.parameters, 1e-3), id="clip_grad_norm_"
        ),
        pytest.param(assign, id="assigned"),
        pytest.param(lambda private: setattr(private.parameters[0], "grad", None), id="deleted"),
    ],
)
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
def test_what_is_done_to_gradients_between_backward_and_step_changes_nothing(
    change: Step, set_to_none: bool
) -> None:
    plain, changed = switchable(), switchable()
    train_step(plain)
    changed.optimizer.zero_grad(set_to_none)
    backward(changed)
    change(changed)
    changed.optimizer.step()
    assert torch.equal(summed(changed), summed(plain))
    assert torch.equal(values(changed), values(plain))


def test_clipped_gradients_without_noise_are_on_show_to_nobody() -> None:
    private = switchable()
    backward(private)
    assert all(p.grad is None and p.summed_grad is None for p in private.parameters)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_optimizer_in_a_hook_finds_nothing_to_step_on(when: str) -> None:
    # The usual way to fuse the optimizer with the backward pass: it would move the parameters by
    # the clipped sum, without noise.
    def fuse(model: nn.Module) -> None:
        for p in model.parameters():
            optimizer = torch.optim.SGD([p], lr=0.1)
            p.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())

    model = Switchable()
    if when == "before":
        fuse(model)
    private = make_private(model)
    if when == "after":
        fuse(model)
    before = values(private)
    backward(private)
    assert torch.equal(values(private), before)


def test_looking_at_gradients_disturbs_nothing() -> None:
    plain, looked = switchable(), switchable()
    train_step(plain)
    # The graph that clips has no edge to a parameter, so no hook sees a sum without noise.
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss_of(looked.model, *batch()), looked.parameters)
    train_step(looked)
    assert torch.equal(summed(looked), summed(plain))


def test_gradients_set_by_hand_without_backward_never_reach_the_parameters() -> None:
    private = switchable()
    before = values(private)
    loss_of(private.model, *batch())
    for p in private.parameters:
        p.grad = torch.full_like(p, 100.0)
    private.optimizer.step()
    assert torch.equal(values(private), before)


def test_a_gradient_set_by_hand_on_a_frozen_parameter_never_reaches_it() -> None:
    private = switchable()
    bias = private.parameters[1].requires_grad_(False)
    before = bias.clone()
    backward(private)
    bias.grad = torch.ones_like(bias)
    private.optimizer.step()
    assert torch.equal(bias, before)


def test_accumulation_over_batches_that_may_share_examples_is_refused() -> None:
    private = switchable()
    backward(private)
    with pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == (
        "Poisson sampling is not compatible with grad accumulation: two batches may share an "
        "example. Call optimizer.step() and zero_grad() after every backward pass, or use "
        "BatchMemoryManager."
    )
    assert_refused_until_zero_grad(private)


def test_accumulation_over_disjoint_batches_counts_them_all() -> None:
    private = switchable(poisson_sampling=False)
    x, y = batch(8)
    parts = []
    for part in (slice(0, 2), slice(2, 8)):
        alone = switchable(poisson_sampling=False)
        loss_of(alone.model, x[part], y[part]).backward()
        alone.optimizer.step()
        parts.append(summed(alone))
        loss_of(private.model, x[part], y[part]).backward()
    private.optimizer.step()
    torch.testing.assert_close(summed(private), parts[0] + parts[1])
    assert private.optimizer.accumulated_iterations == 2
    assert private.optimizer.expected_batch_size == 8
    for p in private.parameters:
        torch.testing.assert_close(p.grad, p.summed_grad / 16)
    assert private.engine.accountant.history == [(0.0, pytest.approx(2 * 8 / 32), 1)]
    private.optimizer.zero_grad()
    backward(private)
    private.optimizer.step()
    assert private.optimizer.accumulated_iterations == 1


def test_accumulation_counts_batches_that_left_a_layer_out() -> None:
    private = switchable(poisson_sampling=False)
    backward(private)
    tricked(lambda m, x: m.body(x)[:, :CLASSES])(private)
    private.optimizer.step()
    assert private.optimizer.accumulated_iterations == 2
    for p in private.parameters:
        torch.testing.assert_close(p.grad, p.summed_grad / 16)


def accumulator(private: Private) -> torch.autograd.graph.Node:
    """Return the node that adds to the head's weight, where hooks cannot be seen from outside."""
    weight = model_of(private).head.weight
    return weight.expand_as(weight).grad_fn.next_functions[0][0]


def test_a_gradient_that_is_replaced_where_it_is_added_up_does_not_count() -> None:
    plain, replaced = switchable(), switchable()
    node = accumulator(replaced)
    node.register_prehook(lambda gradients: tuple(100 * g for g in gradients))
    train_step(plain)
    train_step(replaced)
    assert torch.equal(summed(replaced), summed(plain))


def test_a_gradient_that_is_changed_in_place_where_it_is_added_up_does_not_count() -> None:
    plain, changed = switchable(), switchable()
    node = accumulator(changed)  # it lives as long as there is a reference to it
    node.register_prehook(lambda gradients: tuple(g.mul_(100) for g in gradients))
    train_step(plain)
    train_step(changed)
    assert torch.equal(summed(changed), summed(plain))


def test_a_hook_on_a_parameter_sees_no_sum_without_noise() -> None:
    plain, watched = switchable(), switchable()
    log: list[Tensor] = []
    for parameter in watched.parameters:
        parameter.register_hook(log.append)
        parameter.register_post_accumulate_grad_hook(log.append)
    train_step(plain)
    train_step(watched)
    assert not log
    assert torch.equal(summed(watched), summed(plain))
