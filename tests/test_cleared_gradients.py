"""Gradients may be cleared in any way; gradients that were not cleared are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opacus_bpclip import PrivacyViolationError
from tests.helpers import (
    Private,
    assert_refused_until_zero_grad,
    backward,
    summed,
    switchable,
    train_step,
    values,
)


def test_a_forgotten_zero_grad_is_refused() -> None:
    private = switchable()
    train_step(private)
    with pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == (
        "head.bias.grad was not empty before the backward pass. Call optimizer.zero_grad() after "
        "every step, and leave p.grad alone."
    )
    assert_refused_until_zero_grad(private)


def test_a_second_step_without_zero_grad_is_refused_in_opacus_words() -> None:
    private = switchable()
    train_step(private)
    after = values(private)
    with pytest.raises(ValueError, match="you must call optimizer"):
        private.optimizer.step()
    assert private.steps == 1
    assert torch.equal(values(private), after)


def _clear_one_by_one(private: Private) -> None:
    for p in private.parameters:
        p.grad = None


def _clear_in_place(private: Private) -> None:
    for p in private.parameters:
        p.grad.zero_()


def _clear_through_a_wrapper(private: Private) -> None:
    # Lightning's wrapper for manual optimization shares the attributes of that moment.
    wrapper = object.__new__(type(private.optimizer))
    wrapper.__dict__.update(vars(private.optimizer))
    wrapper.zero_grad()


@pytest.mark.parametrize(
    "clear",
    [
        lambda private: private.optimizer.zero_grad(),
        lambda private: private.optimizer.zero_grad(set_to_none=False),
        lambda private: private.optimizer.original_optimizer.zero_grad(),
        lambda private: private.model.zero_grad(),
        lambda private: private.model.zero_grad(set_to_none=False),
        _clear_one_by_one,
        _clear_in_place,
        _clear_through_a_wrapper,
    ],
)
@pytest.mark.parametrize("wrap_model", [True, False])
def test_gradients_may_be_cleared_in_any_way(
    clear: Callable[[Private], None], wrap_model: bool
) -> None:
    private = switchable(wrap_model=wrap_model)
    for steps in range(1, 4):
        backward(private)
        private.optimizer.step()
        clear(private)
        assert private.steps == steps


def test_a_wrapper_that_copies_attributes_keeps_the_physical_batches_together() -> None:
    plain = summed_of_two_parts(lambda private: private.optimizer.zero_grad())
    assert torch.equal(summed_of_two_parts(_clear_through_a_wrapper), plain)


def summed_of_two_parts(clear: Callable[[Private], None]) -> Tensor:
    private = switchable()
    for skip in (True, False):
        backward(private)
        private.optimizer.signal_skip_step(do_skip=skip)
        private.optimizer.step()
        found = summed(private).clone()
        clear(private)
    return found
