"""What a run has spent is added up over branches and runs, never lost, and held to a target."""

from __future__ import annotations

import math
from typing import Any

import pytest
from opacus.accountants import create_accountant

from opacus_bpclip.integrations.spending import Spending


def spending(*steps: int, target: float | None = None, mechanism: str = "rdp") -> Spending:
    made = Spending(create_accountant(mechanism), 1e-5, target)
    made.accountant.history = [(1.0, 0.01, count) for count in steps]
    return made


def resumed(saved: dict[str, Any], *branches: dict[str, Any]) -> Spending:
    made = spending()
    made.begin()
    made.take_over(saved, branches)
    return made


def test_a_resumed_run_has_spent_what_the_run_had() -> None:
    run = spending(7)
    later = resumed(run.state())
    assert (later.run, later.steps) == (run.run, 7)
    assert later.epsilon == run.epsilon > 0


def test_a_run_in_memory_keeps_steps_that_the_checkpoint_lacks() -> None:
    run = spending(7)
    saved = run.state()
    run.accountant.history = [(1.0, 0.01, 9)]
    run.begin()
    run.take_over(saved, [])
    assert run.steps == 9


def test_later_steps_of_a_branch_count_once() -> None:
    run = spending(7)
    saved = run.state()
    run.accountant.history = [(1.0, 0.01, 12)]
    assert resumed(saved, run.state()).steps == 12


def test_branches_that_train_at_the_same_time_add_up() -> None:
    saved = spending(7).state()
    branches = [resumed(saved) for _ in range(2)]
    for number, branch in enumerate(branches, 1):
        branch.accountant.history.append((1.0, 0.02, number))
    states = [branch.state() for branch in branches]
    for later in (resumed(states[0], states[1]), resumed(saved, *states, *states)):
        assert later.accountant.history == [(1.0, 0.01, 7), (1.0, 0.02, 3)]


def test_two_runs_on_the_data_add_up() -> None:
    run, other = spending(7), spending(4)
    other.take_over(run.state(), [])
    assert other.run == run.run
    assert other.accountant.history == [(1.0, 0.01, 11)]


def test_an_accountant_can_load_what_was_saved() -> None:
    run = spending(7)
    run.accountant.history += [(0.8, 0.01, 2), (1.0, 0.01, 1)]
    run.begin()
    accountant = create_accountant("rdp")
    accountant.load_state_dict(resumed(run.state()).state())
    assert accountant.history == [(1.0, 0.01, 8), (0.8, 0.01, 2)]


def test_processes_count_what_the_first_one_counts() -> None:
    first, second = spending(7), spending(7)
    sent: list[Any] = []
    first.begin()
    first.agree(lambda spent: sent.append(spent) or spent)
    second.begin()
    second.agree(lambda _: sent[0])
    for process in (first, second):
        process.accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert first.state() == second.state()
    assert first.steps == 8


def test_another_accountants_checkpoint_is_refused() -> None:
    other = spending(mechanism="prv")
    with pytest.raises(ValueError, match=r"Pass PrivacyArguments\(accountant='rdp'\)."):
        other.take_over(spending(7).state(), [])
    assert other.steps == 0


def test_a_step_without_noise_spends_everything() -> None:
    run = spending(3)
    run.accountant.history.append((0.0, 0.01, 1))
    assert run.epsilon == math.inf


@pytest.mark.parametrize("before", [0, 50])
def test_the_last_step_is_the_last_that_fits(before: int) -> None:
    run = spending(*[before] * bool(before), target=2.0)
    while not run.is_spent(1.0, 0.01, 1000):
        run.accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert run.epsilon <= 2.0
    assert before < run.steps < 1000
    run.accountant.step(noise_multiplier=1.0, sample_rate=0.01)
    assert run.epsilon > 2.0


@pytest.mark.filterwarnings("ignore:Optimal order")  # of so little noise
def test_less_noise_ends_a_run_earlier() -> None:
    run = spending(10, target=2.0)
    assert not run.is_spent(1.0, 0.01, 100)
    assert run.is_spent(0.3, 0.5, 100)
