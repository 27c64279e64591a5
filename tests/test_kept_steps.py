"""No checkpoint makes the accountant forget a step: epsilon never falls."""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import opacus
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip import PrivacyEngine, register, unregister
from opacus_bpclip.engine.segments import count
from tests.resuming import Script

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")

ACCOUNTANTS = pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
KIND = (1.0, 0.25)
DELTA = 1e-5


def step(engine: opacus.PrivacyEngine, steps: int = 1, kind: tuple[float, float] = KIND) -> None:
    for _ in range(steps):
        engine.accountant.step(noise_multiplier=kind[0], sample_rate=kind[1])


def save(engine: opacus.PrivacyEngine) -> bytes:
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=nn.Linear(1, 1))
    return file.getvalue()


def load(engine: opacus.PrivacyEngine, saved: bytes) -> None:
    engine.load_checkpoint(path=io.BytesIO(saved), module=nn.Linear(1, 1))


def steps_of(engine: opacus.PrivacyEngine) -> int:
    return count(engine.accountant.history).total()


@contextmanager
def told_of(lacking: int, loaded: int) -> Iterator[None]:
    text = f"lacks {lacking} steps that this engine has counted.*added to the checkpoint's {loaded}"
    with pytest.warns(UserWarning, match=text):
        yield


@ACCOUNTANTS
def test_an_earlier_state_that_is_loaded_costs_what_was_spent(accountant: str) -> None:
    engine = PrivacyEngine(accountant=accountant)
    step(engine, 3)
    best = save(engine)
    step(engine, 3)
    spent = engine.get_epsilon(DELTA)
    with told_of(3, 3):
        load(engine, best)
    assert engine.accountant.history == [(*KIND, 6)]
    assert engine.get_epsilon(DELTA) == spent
    step(engine, 2)
    assert engine.accountant.history == [(*KIND, 8)]
    with told_of(5, 3):
        load(engine, best)
    assert engine.accountant.history == [(*KIND, 8)]


def test_training_goes_on_from_the_best_checkpoint(tmp_path: Path) -> None:
    script, path = Script().train(), tmp_path / "best.pt"
    script.engine.save_checkpoint(path=path, **script.parts)
    script.train()
    with told_of(2, 2):
        script.engine.load_checkpoint(path=path, **script.parts)
    assert script.train().steps == 6


@ACCOUNTANTS
def test_a_new_process_goes_on_in_silence(accountant: str) -> None:
    one, other = (PrivacyEngine(accountant=accountant) for _ in range(2))
    step(one, 3)
    load(other, save(one))
    assert other.accountant.history == [(*KIND, 3)]
    step(other)
    load(one, save(other))
    assert one.accountant.history == [(*KIND, 4)]


@ACCOUNTANTS
def test_two_branches_count_what_both_have_taken(accountant: str) -> None:
    one, left, right = (PrivacyEngine(accountant=accountant) for _ in range(3))
    step(one, 3)
    start = save(one)
    for branch in (left, right):
        load(branch, start)
        step(branch, 4)
    with told_of(4, 7):
        load(left, save(right))
    assert left.accountant.history == [(*KIND, 11)]


@ACCOUNTANTS
def test_steps_that_a_checkpoint_does_not_tell_apart_are_added(accountant: str) -> None:
    """As in a checkpoint that Opacus's own engine has saved."""
    theirs, ours = opacus.PrivacyEngine(accountant=accountant), PrivacyEngine(accountant=accountant)
    step(theirs, 3)
    step(ours, 2)
    with told_of(2, 3):
        load(ours, save(theirs))
    assert ours.accountant.history == [(*KIND, 5)]
    fresh = PrivacyEngine(accountant=accountant)
    load(fresh, save(theirs))
    assert fresh.accountant.history == [(*KIND, 3)]
    load(theirs, save(ours))
    assert steps_of(theirs) == 5


def test_the_order_of_a_schedule_is_kept() -> None:
    one, other = PrivacyEngine(accountant="rdp"), PrivacyEngine(accountant="rdp")
    kinds = [(1.0, 0.25), (2.0, 0.25), (1.0, 0.25)]
    for kind in kinds:
        step(one, 2, kind)
    load(other, save(one))
    assert other.accountant.history == one.accountant.history == [(*kind, 2) for kind in kinds]


def test_an_accountant_of_one_kind_counts_all_as_the_worst() -> None:
    engine, other = PrivacyEngine(accountant="gdp"), PrivacyEngine(accountant="gdp")
    step(engine, 3, (1.0, 0.1))
    step(other, 4, (2.0, 0.3))
    saved = [save(engine), save(other)]
    epsilons = [each.get_epsilon(DELTA) for each in (engine, other)]
    with told_of(3, 4):
        load(engine, saved[1])
    assert engine.accountant.history == [(1.0, 0.3, 7)]
    assert engine.get_epsilon(DELTA) > max(epsilons)


def test_an_accountant_of_one_kind_counts_them_once_however_often_they_are_saved() -> None:
    engine, other = PrivacyEngine(accountant="gdp"), PrivacyEngine(accountant="gdp")
    step(engine, 3, (1.0, 0.1))
    step(other, 4, (2.0, 0.3))
    with told_of(3, 4):
        load(engine, save(other))
    for _ in range(2):
        again = PrivacyEngine(accountant="gdp")
        load(again, save(engine))
        step(again, 1, (1.0, 0.3))
        load(again, save(again))
        engine = again
    assert engine.accountant.history == [(1.0, 0.3, 9)]


def test_our_own_engine_counts_once_while_opacus_is_registered() -> None:
    register()
    try:
        engine = PrivacyEngine(accountant="rdp")
        step(engine, 3)
        load(engine, save(engine))
    finally:
        unregister()
    assert steps_of(engine) == 3


def test_a_load_that_fails_forgets_nothing(tmp_path: Path) -> None:
    script, path = Script().train(), tmp_path / "checkpoint.pt"
    other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    state = Script().optimizer.state_dict() | {"param_groups": []}

    class Refused:
        def state_dict(self) -> dict[str, Any]:
            return state

    own = {"args": argparse.Namespace(lr=0.1)}  # such things are loaded with weights_only=False
    script.engine.save_checkpoint(
        path=path, module=script.model, optimizer=Refused(), checkpoint_dict=own
    )
    script.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="parameter group"):
            script.engine.load_checkpoint(path=path, **script.parts)
    assert script.steps == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script.engine.load_checkpoint(path=path, module=script.model)
    assert script.steps == 4
    before = script.engine.accountant.history
    with pytest.raises(RuntimeError, match="state_dict"):
        script.engine.load_checkpoint(path=path, module=other)
    assert script.engine.accountant.history is before


def test_an_accountant_that_was_replaced_has_steps_of_its_own() -> None:
    engine = PrivacyEngine(accountant="rdp")
    step(engine, 3)
    saved = save(engine)
    engine.accountant = type(engine.accountant)()
    step(engine, 2)
    with told_of(2, 3):
        load(engine, saved)
    assert steps_of(engine) == 5


@pytest.mark.parametrize("make", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_the_steps_of_an_engines_copy_are_its_own(make: Callable[[Any], Any]) -> None:
    engine = PrivacyEngine(accountant="rdp")
    step(engine, 3)
    save(engine)
    copied = make(engine)
    step(engine, 2)
    step(copied, 2)
    with told_of(2, 5):
        load(engine, save(copied))
    assert steps_of(engine) == 7


def test_opacus_own_engine_forgets_nothing_either_while_it_is_registered() -> None:
    engine = opacus.PrivacyEngine(accountant="rdp")
    register()
    try:
        step(engine, 3)
        best = save(engine)
        step(engine, 3)
        with told_of(3, 3):
            load(engine, best)
        assert steps_of(engine) == 6
    finally:
        unregister()
    load(engine, best)
    assert steps_of(engine) == 3


@pytest.mark.filterwarnings("ignore:The checkpoint lacks")
@given(st.data())
def test_each_step_that_is_known_of_counts_once(data: st.DataObject) -> None:
    """Three processes step, save, and load each other's checkpoints, in any order."""
    engines = [PrivacyEngine(accountant="rdp") for _ in range(3)]
    known: list[set[tuple[int, tuple[float, float]]]] = [set() for _ in engines]
    saved: list[tuple[bytes, set[Any]]] = []
    for number in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, 2))
        engine = engines[at]
        what = data.draw(st.sampled_from(["step", "save", "load"]))
        if what == "step":
            kind = data.draw(st.sampled_from([(1.0, 0.25), (2.0, 0.25), (1.0, 0.5)]))
            step(engine, 1, kind)
            known[at].add((number, kind))
        elif what == "save":
            saved.append((save(engine), set(known[at])))
        elif saved:
            file, steps = data.draw(st.sampled_from(saved))
            load(engine, file)
            known[at] |= steps
        assert count(engine.accountant.history) == Counter(kind for _, kind in known[at])
