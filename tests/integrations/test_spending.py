"""What a run has spent is kept, added up over branches and runs, and never lost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from opacus.accountants import create_accountant

from opacus_bpclip.integrations.spending import FILE, Spending


def spending(*steps: int, target: float | None = None, mechanism: str = "rdp") -> Spending:
    made = Spending(create_accountant(mechanism), 1e-5, target)
    made.accountant.history = [(1.0, 0.01, count) for count in steps]
    return made


def test_a_checkpoint_says_what_was_spent(tmp_path: Path) -> None:
    run, later = spending(7), spending()
    run.save(tmp_path / FILE)
    later.restore(tmp_path)
    assert (later.run, later.steps) == (run.run, 7)
    assert later.epsilon == run.epsilon > 0


def test_a_run_in_memory_keeps_steps_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    run = spending(7)
    run.save(tmp_path / FILE)
    run.accountant.history = [(1.0, 0.01, 9)]
    run.restore(tmp_path)
    assert run.steps == 9


def test_the_longest_branch_of_a_run_counts(tmp_path: Path) -> None:
    run = spending(7)
    run.save(tmp_path / "checkpoint-7" / FILE)
    run.accountant.history = [(1.0, 0.01, 12)]
    run.save(tmp_path / "checkpoint-12" / FILE)
    spending(99).save(tmp_path / "checkpoint-99" / FILE)  # of another run
    later = spending()
    later.restore(tmp_path / "checkpoint-7")
    assert later.steps == 12


def test_two_runs_on_the_data_add_up(tmp_path: Path) -> None:
    spending(7).save(tmp_path / FILE)
    other = spending(4)
    other.restore(tmp_path)
    assert other.accountant.history == [(1.0, 0.01, 7), (1.0, 0.01, 4)]


def test_a_checkpoint_without_a_history_is_refused(tmp_path: Path) -> None:
    text = r"has no privacy.json, so the steps .* load it with from_pretrained, and train without"
    with pytest.raises(ValueError, match=text):
        spending().restore(tmp_path)


def test_another_accountants_checkpoint_is_refused(tmp_path: Path) -> None:
    spending(7).save(tmp_path / FILE)
    other = spending(mechanism="prv")
    with pytest.raises(ValueError, match=r"Pass PrivacyArguments\(accountant='rdp'\)."):
        other.restore(tmp_path)
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
