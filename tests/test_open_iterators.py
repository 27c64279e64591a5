"""An iterator that is still open does not shift the physical batches of another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.sampling.problems import SEVERAL_ITERATORS
from tests.helpers import Private
from tests.sampling import in_parts, refused, train

pytestmark = [
    pytest.mark.parametrize("manager", [False, True], ids=["constant shape", "manager"]),
    pytest.mark.parametrize("workers", [0, 1]),
]


def refused_at_first(private: Private, loader: DataLoader[Any]) -> None:
    for x, y in loader:
        refused(private, x, y, SEVERAL_ITERATORS)
        break


def train_on_all(private: Private, loader: DataLoader[Any]) -> None:
    before = private.steps
    for x, y in loader:
        train(private, x, y)
    assert private.steps - before == len(private.loader)


def test_a_loop_beside_an_open_iterator_is_refused_until_it_is_closed(
    manager: bool, workers: int
) -> None:
    with in_parts(manager=manager, workers=workers) as (private, loader):
        it = iter(loader)
        next(it)
        refused_at_first(private, loader)
        del it
        train_on_all(private, loader)


def test_an_iterator_that_is_closed_or_exhausted_first_is_no_obstacle(
    manager: bool, workers: int
) -> None:
    with in_parts(manager=manager, workers=workers) as (private, loader):
        it = iter(loader)
        next(it)
        del it
        train_on_all(private, loader)
        it = iter(loader)
        assert list(it)
        train_on_all(private, loader)


def test_a_loop_is_begun_anew_beside_iterators_that_nobody_can_close(
    manager: bool, workers: int
) -> None:
    with in_parts(manager=manager, workers=workers) as (private, loader):
        held, interrupted = iter(loader), iter(loader)
        next(held)
        refused(private, *next(interrupted), SEVERAL_ITERATORS)
        train_on_all(private, loader)
        for iterator in (held, interrupted):  # whose batches are those of before
            refused(private, *next(iterator), SEVERAL_ITERATORS)
        train_on_all(private, loader)


def test_training_inside_an_open_evaluation_is_refused(manager: bool, workers: int) -> None:
    with in_parts(manager=manager, workers=workers) as (private, loader):
        for _ in loader:
            refused_at_first(private, loader)
            break
        train_on_all(private, loader)


def test_a_batch_that_is_read_before_the_step_is_not_taken_for_the_one_at_hand(
    manager: bool, workers: int
) -> None:
    with in_parts(manager=manager, workers=workers) as (private, loader):
        others = iter(loader)
        for x, y in loader:
            next(others)  # the one read last, and not trained on
            refused(private, x, y, SEVERAL_ITERATORS)
            break
        del others
        train_on_all(private, loader)


def test_two_loops_at_once_are_refused(manager: bool, workers: int) -> None:
    with in_parts(manager=manager, workers=workers) as (private, loader):
        for (x, y), _ in zip(loader, loader, strict=False):
            refused(private, x, y, SEVERAL_ITERATORS)
            break
        train_on_all(private, loader)


def test_a_list_of_batches_that_is_made_inside_an_open_loop_is_refused(
    manager: bool, workers: int
) -> None:
    with in_parts(manager=manager, workers=workers) as (private, loader):
        it = iter(loader)
        next(it)
        for x, y in list(loader):
            with pytest.raises(PrivacyViolationError):
                train(private, x, y)
            private.optimizer.zero_grad()
            break
        assert private.steps == 0
        del it
        train_on_all(private, loader)


def train_in_turn(private: Private, inner: Iterator[Any], outer: Iterator[Any]) -> None:
    private.optimizer.zero_grad()  # the outer loop's batch failed, as for want of memory
    private.optimizer.step()
    train(private, *next(inner))
    train(private, *next(outer))


def test_a_part_of_the_outer_loops_sample_is_no_part_of_the_inner_ones(
    manager: bool, workers: int
) -> None:
    with in_parts(manager=manager, workers=workers) as (private, loader):
        outer, inner = iter(loader), iter(loader)
        next(outer)
        with pytest.raises(PrivacyViolationError):
            train_in_turn(private, inner, outer)
        assert private.steps == 0
        private.optimizer.zero_grad()
        del outer, inner
        train_on_all(private, loader)
