"""Physical batches that are not all stepped on do not become parts of other samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.sampling.problems import LEFT_OUT, TWO_SAMPLES
from tests.helpers import Private, dataset, make_private, mlp
from tests.sampling import counted, in_parts, refused, train

# Physical batches that are not all stepped on


def physical(private: Private, size: int = 4) -> BatchMemoryManager:
    return BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=size, optimizer=private.optimizer
    )


def large(**options: Any) -> Private:
    return make_private(mlp(), counted=True, batch_size=16, noise_multiplier=1.0, **options)


def train_on_all(private: Private, loader: Iterable[Any]) -> None:
    for x, y in loader:
        train(private, x, y)


def train_twice_but_for_the_first(private: Private, loader: Iterable[Any]) -> None:
    for _ in range(2):
        for index, (x, y) in enumerate(loader):
            if index:
                train(private, x, y)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loop_over_physical_batches_may_be_used_for_evaluation(workers: int) -> None:
    private = large()
    if workers:
        private.loader.num_workers, private.loader.prefetch_factor = workers, 2
    with physical(private) as loader:
        for epoch in range(1, 4):
            for x, y in loader:
                train(private, x, y)
            with torch.no_grad():
                assert sum(len(private.model(x)) for x, _ in loader) > 0
            assert private.steps == epoch * len(private.loader)


@pytest.mark.parametrize("through", ["itself", "its physical batches"])
def test_evaluation_in_the_middle_of_a_logical_batch_is_no_part_of_it(through: str) -> None:
    private = large()
    with physical(private) as loader:
        for x, y in loader:
            train(private, x, y)
            with torch.no_grad():
                for z, _ in private.loader if through == "itself" else loader:
                    private.model(z)
    assert private.steps == len(private.loader)


def evaluate(private: Private) -> None:
    with torch.no_grad():
        for x, _ in private.loader:
            private.model(x)


def train_between_evaluations(private: Private, *, left_out: int) -> None:
    for _ in range(2):
        for index, (x, y) in enumerate(private.loader):
            if index != left_out:
                train(private, x, y)
            evaluate(private)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_after_each_step_leaves_the_pass_as_it_was(workers: int, rows: int) -> None:
    private = large(physical_batch_size=rows)
    if workers:
        private.loader.num_workers, private.loader.prefetch_factor = workers, 2
    train_between_evaluations(private, left_out=-1)
    assert private.steps == 2 * len(private.loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_that_is_left_out_for_evaluation_is_noticed(workers: int) -> None:
    private = large(physical_batch_size=4)
    if workers:
        private.loader.num_workers, private.loader.prefetch_factor = workers, 2
    with pytest.raises(PrivacyViolationError) as refusal:
        train_between_evaluations(private, left_out=1)
    assert str(refusal.value) == LEFT_OUT


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loop_may_end_early(workers: int) -> None:
    private = large(physical_batch_size=64)  # each sample one batch
    if workers:
        private.loader.num_workers, private.loader.prefetch_factor = workers, 2
    for _ in range(3):
        for x, y in private.loader:
            train(private, x, y)
            break
    assert private.steps == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("left_out", [1, 2, 4])
def test_a_physical_batch_that_is_left_out_is_noticed_at_the_next(
    workers: int, left_out: int
) -> None:
    private = large(data=dataset(200))
    if workers:
        private.loader.num_workers, private.loader.prefetch_factor = workers, 2
    with physical(private) as loader:
        for index, (x, y) in enumerate(loader):
            if index < left_out:
                train(private, x, y)
            elif index > left_out:
                refused(private, x, y, LEFT_OUT)
                break


def test_the_first_physical_batch_that_is_left_out_is_noticed_in_the_next_pass() -> None:
    private = large()
    with physical(private) as loader, pytest.raises(PrivacyViolationError) as refusal:
        train_twice_but_for_the_first(private, loader)
    assert private.steps <= len(private.loader)
    private.optimizer.zero_grad()
    assert str(refusal.value) == LEFT_OUT


def test_a_step_without_gradients_stands_for_a_physical_batch_that_failed() -> None:
    private = large()
    with physical(private) as loader:
        for index, (x, y) in enumerate(loader):
            if index % 3 == 1:
                private.optimizer.zero_grad()  # as after running out of memory
                private.optimizer.step()
            else:
                train(private, x, y)
    assert private.steps == len(private.loader)


def test_empty_physical_batches_may_be_left_out() -> None:
    private = make_private(mlp(), counted=True, batch_size=1, noise_multiplier=1.0)
    with physical(private) as loader:
        steps = 0
        for x, y in loader:
            if len(x):
                train(private, x, y)
                steps += 1
    assert private.steps == steps < len(private.loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_is_left_but_still_held_does_not_add_to_the_next(workers: int) -> None:
    private = large()
    if workers:
        private.loader.num_workers, private.loader.prefetch_factor = workers, 2
    with physical(private) as loader:
        held = iter(loader)
        train(private, *next(held))
    with physical(private) as loader, pytest.raises(PrivacyViolationError):
        train_on_all(private, loader)
    del held


def test_several_batches_may_be_taken_before_the_first_step() -> None:
    private = counted()
    for x, y in [next(iter(private.loader)) for _ in range(5)]:
        train(private, x, y)
    assert private.steps == 5


@pytest.mark.parametrize("manager", [False, True], ids=["constant shape", "manager"])
def test_first_batches_of_several_passes_never_join_in_one_step(manager):
    with in_parts(manager=manager, workers=0) as (private, loader):
        for _ in range(4):
            collecting = False
            for x, y in [next(iter(loader)) for _ in range(5)]:
                try:
                    train(private, x, y)
                except PrivacyViolationError as refusal:
                    assert str(refusal) == TWO_SAMPLES  # noqa: PT017 (also if none is raised)
                    private.optimizer.zero_grad()
                    collecting = False
                else:
                    assert not collecting, "a part of one sample was added to another's"
                    collecting = private.optimizer._is_last_step_skipped
