"""Whatever goes on from a checkpoint or a copy draws other noise and samples than before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opacus
import pytest
import torch
from torch.optim import SGD

from opacus_bpclip import CoverageError, PrivacyEngine, register, unregister
from tests.resuming import Script, check_no_noise_twice, check_no_sample_twice

OWN = pytest.mark.parametrize("own", [False, True], ids=["torch's generator", "own generators"])


def check_nothing_twice(*scripts: Script) -> None:
    check_no_noise_twice(*scripts)
    check_no_sample_twice(*scripts)


def saved(folder: Path, **options: Any) -> tuple[Script, Path]:
    script, path = Script(**options).train(), folder / "checkpoint.pt"
    script.engine.save_checkpoint(path=path, **script.parts)
    return script, path


def loaded(path: Path, **options: Any) -> Script:
    script = Script(**options)
    script.engine.load_checkpoint(path=path, **script.parts)
    return script


@OWN
def test_a_script_that_goes_on_draws_nothing_twice_however_often_it_does(
    own: bool, tmp_path: Path
) -> None:
    before, path = saved(tmp_path, own=own)
    runs = [loaded(path, own=own) for _ in range(3)]
    check_nothing_twice(before, *(run.train() for run in runs))
    assert all(run.steps == 4 for run in runs)


@OWN
def test_a_script_that_begins_anew_draws_the_same(own: bool) -> None:
    one, other = Script(own=own).train(), Script(own=own).train()
    assert one.samples == other.samples
    assert all(map(torch.equal, one.noise, other.noise))


@OWN
def test_a_checkpoint_without_the_optimizer_goes_on_with_other_numbers(
    own: bool, tmp_path: Path
) -> None:
    before, path = Script(own=own).train(), tmp_path / "checkpoint.pt"
    before.engine.save_checkpoint(path=path, module=before.model)
    after = Script(own=own)
    after.engine.load_checkpoint(path=path, module=after.model)
    check_nothing_twice(before, after.train())


@OWN
def test_a_checkpoint_that_is_loaded_before_make_private(own: bool, tmp_path: Path) -> None:
    before, path = Script(own=own).train(), tmp_path / "checkpoint.pt"
    plain = before.model.to_standard_module()
    before.engine.save_checkpoint(path=path, module=plain)
    engine = PrivacyEngine(accountant="rdp")
    engine.load_checkpoint(path=path, module=plain)
    check_nothing_twice(before, Script(engine, own=own).train())


@OWN
def test_an_optimizers_state_that_is_loaded_by_hand(own: bool) -> None:
    before, after = Script(own=own).train(), Script(own=own)
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    check_nothing_twice(before, after.train())


def test_the_state_of_a_plain_optimizer_may_be_of_a_private_run() -> None:
    before, after = Script().train(), Script()
    after.optimizer.load_state_dict(before.optimizer.original_optimizer.state_dict())
    check_nothing_twice(before, after.train())


@OWN
def test_an_accountant_that_is_loaded_by_hand_before_make_private(own: bool) -> None:
    before, engine = Script(own=own).train(), PrivacyEngine(accountant="rdp")
    engine.accountant.load_state_dict(before.engine.accountant.state_dict())
    check_nothing_twice(before, Script(engine, own=own).train())


def test_a_state_that_is_put_back_after_more_steps() -> None:
    script = Script()
    state = copy.deepcopy(script.optimizer.state_dict())
    script.train()
    torch.manual_seed(0)
    script.optimizer.load_state_dict(state)
    check_nothing_twice(script.train())


def test_a_state_that_is_put_back_at_once_changes_nothing() -> None:
    """As accelerate does, to move it to a device."""
    one, other = Script(), Script()
    for _ in range(2):
        other.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    states = [script.optimizer.generator.get_state() for script in (one, other)]
    assert torch.equal(*states)
    torch.manual_seed(0)
    one.train()
    torch.manual_seed(0)
    other.train()
    assert one.samples == other.samples
    assert all(map(torch.equal, one.noise, other.noise))


def test_the_users_generators_stay_in_use_and_may_be_set_back_on_purpose(tmp_path: Path) -> None:
    before, path = saved(tmp_path, own=True)
    sources = before.optimizer.generator, before.loader.generator
    states = [source.get_state() for source in sources]
    before.train()
    after = loaded(path, own=True)
    theirs = after.optimizer.generator, after.loader.generator
    for source, state in zip(theirs, states, strict=True):
        source.set_state(state)
    after.train()
    assert after.samples == before.samples[2:]
    assert torch.equal(after.noise[0], before.noise[2])


def test_secure_mode_has_no_seed() -> None:
    before, after = Script(own=True), Script(own=True)
    state = after.optimizer.generator.get_state()
    after.optimizer.secure_mode = True
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    assert torch.equal(after.optimizer.generator.get_state(), state)


def test_without_poisson_sampling_the_noise_is_another_one() -> None:
    before, after = (Script(poisson_sampling=False, own=True) for _ in range(2))
    before.train()
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    check_no_noise_twice(before, after.train())


def test_a_checkpoint_renews_all_that_its_engine_has_made(tmp_path: Path) -> None:
    _, path = saved(tmp_path, own=True)
    engine = PrivacyEngine(accountant="rdp")
    both = [Script(engine, own=True) for _ in range(2)]
    states = [script.optimizer.generator.get_state() for script in both]
    engine.load_checkpoint(path=path, **both[1].parts)
    for script, state in zip(both, states, strict=True):
        assert not torch.equal(script.optimizer.generator.get_state(), state)
    third = Script(engine, own=True)
    check_nothing_twice(*(script.train() for script in [*both, third]))


def test_opacus_own_engine_draws_nothing_twice(tmp_path: Path) -> None:
    register()
    try:
        before, path = saved(tmp_path, engine=opacus.PrivacyEngine(accountant="rdp"))
        after = loaded(path, engine=opacus.PrivacyEngine(accountant="rdp"))
        check_nothing_twice(before, after.train())
        assert after.steps == 4
    finally:
        unregister()


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def copied(script: Script, make: Callable[[Any], Any]) -> Script:
    other = copy.copy(script)
    other.engine, other.model, other.optimizer, other.loader = make(
        (script.engine, script.model, script.optimizer, script.loader)
    )
    other.noise, other.samples = [], []
    return other


@OWN
@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
@pytest.mark.parametrize("trained", [0, 2])
def test_a_copy_of_all_parts_draws_what_nothing_else_draws(
    make: Callable[[Any], Any], own: bool, trained: int
) -> None:
    script = Script(own=own).train(trained)
    copies = [copied(script, make) for _ in range(2)]
    check_nothing_twice(script.train(), *(each.train() for each in copies))


def test_a_deep_copy_shares_the_generators() -> None:
    script = Script(own=True)
    deep = copied(script, copy.deepcopy)
    assert deep.optimizer.generator is script.optimizer.generator
    assert deep.loader.generator is script.loader.generator
    assert deep.loader.batch_sampler.generator is script.loader.batch_sampler.generator
    alone = copy.deepcopy(script.loader.batch_sampler)
    assert alone.generator is script.loader.batch_sampler.generator


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_the_copy_of_an_engine_makes_what_the_original_does_not(make: Callable[[Any], Any]) -> None:
    script = Script(own=True)
    engine = make(script.engine)
    engine.dataset = script.engine.dataset
    others = [Script(each, own=True) for each in (script.engine, engine)]
    check_nothing_twice(script.train(), *(other.train() for other in others))


@OWN
def test_loaders_and_noise_that_one_engine_makes_from_equal_seeds_are_told_apart(own: bool) -> None:
    engine = PrivacyEngine(accountant="rdp")
    first = [Script(engine, own=own).train() for _ in range(3)]
    check_nothing_twice(*first)
    engine = PrivacyEngine(accountant="rdp")
    again = [Script(engine, own=own).train() for _ in range(3)]
    assert [script.samples for script in again] == [script.samples for script in first]


def test_a_generator_in_the_present_state_of_another_one_is_told_apart() -> None:
    engine = PrivacyEngine(accountant="rdp")
    one = Script(engine, own=True).train()
    alike = [
        torch.Generator().set_state(generator.get_state())
        for generator in (one.optimizer.generator, one.loader.generator)
    ]
    other = Script(engine, generators=alike)
    check_nothing_twice(one.train(), other.train())


def test_a_refused_call_does_not_count() -> None:
    engine = PrivacyEngine(accountant="rdp")
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    with pytest.raises(CoverageError):
        engine.make_private(
            module=model,
            optimizer=SGD(model.parameters(), lr=0.1),
            data_loader=Script().loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            clipping="backprop",
        )
    assert Script(engine, own=True).train().samples == Script(own=True).train().samples


def test_noise_and_samples_from_equal_seeds_are_told_apart() -> None:
    """Noise from the numbers that have chosen the sample would tell who is in it."""
    runs = [
        Script(generators=[torch.Generator().manual_seed(seed) for seed in seeds])
        for seeds in ((7, 7), (7, 7), (8, 7))
    ]
    alike, again, other = [
        [torch.rand(9, generator=g) for g in (run.optimizer.generator, run.loader.generator)]
        for run in runs
    ]
    assert not torch.equal(*alike)
    assert torch.equal(alike[0], again[0])
    assert torch.equal(alike[1], torch.rand(9, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(other[0], torch.rand(9, generator=torch.Generator().manual_seed(8)))


def test_a_model_that_is_all_frozen_is_loaded(tmp_path: Path) -> None:
    script, path = Script().train(), tmp_path / "checkpoint.pt"
    script.engine.save_checkpoint(path=path, **script.parts)
    evaluated = Script()
    evaluated.model.requires_grad_(False)
    evaluated.engine.load_checkpoint(path=path, **evaluated.parts)
    assert evaluated.steps == 2


def test_a_checkpoint_that_is_missing_changes_nothing(tmp_path: Path) -> None:
    script = Script(own=True)
    with pytest.raises(FileNotFoundError):
        script.engine.load_checkpoint(path=tmp_path / "none.pt", **script.parts)
    assert script.train().samples == Script(own=True).train().samples


def test_one_generator_for_noise_and_samples_stays_one() -> None:
    both = torch.Generator().manual_seed(7)
    script = Script(generators=[both, both])
    assert script.optimizer.generator is script.loader.generator is both
    script.train()
