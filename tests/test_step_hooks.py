"""The hook that counts steps: the accountant's, one of one's own beside it, and what they raise."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from opacus.accountants import RDPAccountant, create_accountant
from opacus.optimizers import DPOptimizer

from opacus_bpclip import AdaptiveThreshold, PrivacyEngine, PrivacyViolationError
from opacus_bpclip.optimizer.accounting import AccountStep
from tests.budgets import layerwise
from tests.helpers import backward, make_private, one_layer, train_step
from tests.resuming import Script


def test_a_step_needs_no_accountant() -> None:
    private = make_private(one_layer(), backprop=layerwise())
    private.optimizer.attach_step_hook(None)
    before = private.parameters[0].detach().clone()
    train_step(private)
    assert private.steps == 0
    assert not torch.equal(private.parameters[0], before)


def test_a_hook_of_ones_own_does_not_replace_the_accountants() -> None:
    private = make_private(one_layer(), backprop=layerwise())
    seen: list[int] = []
    for _ in range(2):
        private.optimizer.attach_step_hook(lambda own: seen.append(private.steps))
        train_step(private)
    assert seen == [1, 2]
    copied = copy.deepcopy(private.optimizer)
    assert copied.step_hook.then is private.optimizer.step_hook.then


def test_a_hook_that_reads_the_accountant_counts_nothing_and_the_accountant_stays() -> None:
    private = make_private(one_layer(), backprop=layerwise())
    accountant, seen = private.engine.accountant, []

    def hook(optimizer: object) -> None:
        seen.append(len(accountant.history))
        later.append(0)

    private.optimizer.attach_step_hook(hook)
    later: list[int] = []
    train_step(private)
    assert private.steps == len(later) == 1
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
def test_an_accountant_of_one_kind_keeps_its_steps_when_it_refuses_another() -> None:
    accountant = create_accountant("gdp")
    step = AccountStep(accountant, 0.5)
    for noise_multiplier in (1.0, 1.0):
        step(SimpleNamespace(noise_multiplier=noise_multiplier, accumulated_iterations=1))
    with pytest.raises(ValueError, match="have to stay constant"):
        step(SimpleNamespace(noise_multiplier=2.0, accumulated_iterations=1))
    assert accountant.history == [(1.0, 0.5, 2)]


def test_the_accountants_own_hook_counts_each_step_once() -> None:
    private = make_private(one_layer(), backprop=layerwise())
    hook = private.engine.accountant.get_optimizer_hook_fn(sample_rate=0.5)
    private.optimizer.attach_step_hook(hook)
    train_step(private)
    assert private.engine.accountant.history[0][1:] == (0.5, 1)


def test_an_accountant_that_replaces_the_engines_is_refused_before_its_epsilon_is_wrong() -> None:
    script = Script().train()
    before = [p.detach().clone() for p in script.optimizer.params]
    script.engine.accountant = create_accountant("prv")
    with pytest.raises(PrivacyViolationError, match="accountant was replaced after make_private"):
        script.train()
    assert script.steps == 0
    assert all(map(torch.equal, script.optimizer.params, before))
    assert all(p.grad is None for p in script.optimizer.params)


def test_an_accountant_that_brings_its_own_hook_may_replace_the_engines() -> None:
    script = Script()
    script.engine.accountant = create_accountant("prv")
    hook = script.engine.accountant.get_optimizer_hook_fn(sample_rate=0.25)
    script.optimizer.attach_step_hook(hook)
    assert script.train().steps == 2


def test_the_remedies_for_a_replaced_accountant(tmp_path: Path) -> None:
    before, path = Script().train(), tmp_path / "checkpoint.pt"
    before.engine.save_checkpoint(path=path, **before.parts)
    script = Script(PrivacyEngine(accountant="rdp"))
    script.engine.load_checkpoint(path=path, **script.parts)
    assert script.train().steps == 4


@pytest.mark.parametrize("first", [0, 1], ids=["engine", "optimizer"])
def test_copies_count_for_the_accountant_that_is_copied_with_them(first: int) -> None:
    script = Script()
    parts = [script.engine, script.optimizer, script.loader, script.model]
    copied = copy.deepcopy(parts if first == 0 else parts[::-1])
    other = Script()
    other.engine, other.optimizer, other.loader, other.model = copied[:: 1 if first == 0 else -1]
    assert other.train().steps == 2


def test_what_is_pickled_or_outlives_its_engine_goes_on() -> None:
    script = Script()
    accountant = script.optimizer.step_hook.accountant
    loaded = pickle.loads(pickle.dumps(script.optimizer.step_hook))
    loaded(SimpleNamespace(noise_multiplier=1.0, accumulated_iterations=1))
    assert loaded.accountant.history == [(1.0, 0.25, 1)]
    del script.engine
    script.train()
    assert accountant.history == [(1.0, 0.25, 2)]


def test_after_an_error_of_a_hook_nothing_is_released_and_the_next_batch_is_as_any() -> None:
    script = Script()

    def stop(optimizer: DPOptimizer) -> None:
        raise RuntimeError("enough")

    script.optimizer.attach_step_hook(stop)
    before = [p.detach().clone() for p in script.optimizer.params]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="enough"):
            script.train(steps=1)
        assert all(p.grad is None for p in script.optimizer.params)
        assert all(map(torch.equal, script.optimizer.params, before))
    script.optimizer.attach_step_hook(lambda optimizer: None)
    assert script.train().steps == 4


def test_an_accountants_own_hook_stays_when_another_one_is_attached_later() -> None:
    script = Script()
    hook = script.engine.accountant.get_optimizer_hook_fn(sample_rate=0.25)
    script.optimizer.attach_step_hook(hook)
    script.train()
    script.optimizer.attach_step_hook(lambda optimizer: None)
    assert script.train().steps == 4
    copied = copy.deepcopy(script).train()
    assert (script.steps, copied.steps) == (4, 6)
    script.engine.accountant = create_accountant("rdp")
    with pytest.raises(PrivacyViolationError, match="accountant was replaced after make_private"):
        script.train()


def test_a_hook_may_call_the_one_that_it_replaces() -> None:
    script, seen = Script(), []
    old = script.optimizer.step_hook

    def both(optimizer: DPOptimizer) -> None:
        old(optimizer)
        seen.append(script.steps)

    script.optimizer.attach_step_hook(both)
    assert script.train().steps == 2
    assert seen == [1, 2]


def test_an_accountant_that_replaces_one_with_steps_is_refused_with_its_hook_too() -> None:
    script = Script().train()
    script.engine.accountant = create_accountant("prv")
    hook = script.engine.accountant.get_optimizer_hook_fn(sample_rate=0.25)
    with pytest.raises(PrivacyViolationError, match="replaced after steps that the one before"):
        script.optimizer.attach_step_hook(hook)


def test_the_hook_of_another_engine_does_not_replace_ones_own() -> None:
    script, other = Script(), Script()
    script.optimizer.attach_step_hook(other.optimizer.step_hook)
    script.train()
    assert (script.steps, other.steps) == (2, 2)


class Doubling(RDPAccountant):
    """Counts each step twice, by a hook of its own."""

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[DPOptimizer], None]:
        once = super().get_optimizer_hook_fn(sample_rate)

        def twice(optimizer: DPOptimizer) -> None:
            once(optimizer)
            once(optimizer)

        return twice


def test_an_accountant_with_a_hook_of_its_own_counts_by_it() -> None:
    engine = PrivacyEngine()
    engine.accountant = Doubling()
    assert Script(engine).train().steps == 4


def test_a_noise_multiplier_that_is_changed_in_place_changes_nothing_that_was_counted() -> None:
    script = Script()
    noise_multiplier = torch.tensor(0.5)
    script.optimizer.noise_multiplier = noise_multiplier
    script.train()
    noise_multiplier *= 4
    assert script.train().engine.accountant.history == [(0.5, 0.25, 4)]
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="to be a finite number >= 0"):
            script.optimizer.noise_multiplier = wrong
    assert script.optimizer.noise_multiplier == 0.5


def test_thresholds_do_not_follow_a_step_that_nobody_counted() -> None:
    options = layerwise(threshold=AdaptiveThreshold(initial=0.5))
    private = make_private(one_layer(), backprop=options, loss_reduction="sum")
    before = dict(private.optimizer.thresholds)

    def stop(optimizer: DPOptimizer) -> None:
        raise RuntimeError("enough")

    private.optimizer.attach_step_hook(stop)
    with pytest.raises(RuntimeError, match="enough"):
        train_step(private)
    assert private.optimizer.thresholds == before
    private.optimizer.attach_step_hook(lambda optimizer: None)
    train_step(private)
    assert private.optimizer.thresholds != before


def test_sums_that_are_kept_do_not_reach_the_next_step() -> None:
    private = make_private(one_layer(), backprop=layerwise())
    private.optimizer.keep_summed_grad = True
    sums = []
    for _ in range(3):
        private.model.zero_grad()  # which leaves the sums alone
        backward(private)
        private.optimizer.step()
        sums.append([p.summed_grad.clone() for p in private.parameters])
        with torch.no_grad():
            for p in private.parameters:
                p.zero_()
    assert all(map(torch.equal, sums[1], sums[2]))
