"""Killers of mutants of what begins again: checkpoints, copies, and loaders seeded alike."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import torch
from opacus.accountants import create_accountant

from opacus_bpclip import PrivacyEngine, PrivacyViolationError
from tests.resuming import Script, check_no_noise_twice, check_no_sample_twice


def _checkpoint(script: Script) -> io.BytesIO:
    file = io.BytesIO()
    script.engine.save_checkpoint(path=file, **script.parts)
    file.seek(0)
    return file


def _resumed(*, own: bool) -> tuple[Script, ...]:
    """Return a script that was started three times, the later times from the first one's end."""
    before = Script(own=own).train()
    runs = [Script(own=own) for _ in range(2)]
    for run in runs:
        run.engine.load_checkpoint(path=_checkpoint(before), **run.parts)
    return before, *(run.train() for run in runs)


def noise_of_a_resumed_script() -> None:
    """The noise of a script with fixed seeds that is started, and twice resumed from a
    checkpoint."""
    check_no_noise_twice(*_resumed(own=False))
    check_no_noise_twice(*_resumed(own=True))


def samples_of_a_resumed_script() -> None:
    """The samples of a script with fixed seeds that is started, and twice resumed from a
    checkpoint."""
    check_no_sample_twice(*_resumed(own=False))
    check_no_sample_twice(*_resumed(own=True))


def noise_of_two_resumes_by_hand() -> None:
    """The noise of two scripts that load the state of one optimizer by hand."""
    before = Script(own=True).train()
    runs = [Script(own=True) for _ in range(2)]
    for run in runs:
        run.optimizer.load_state_dict(before.optimizer.state_dict())
    check_no_noise_twice(before, *(run.train() for run in runs))


def samples_of_copies() -> None:
    """The samples of a loader, of its deep copy, and of what was pickled."""
    script = Script(own=True)
    for make in (copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))):
        other = Script(own=True)
        other.model, other.optimizer, other.loader = make(
            (script.model, script.optimizer, script.loader)
        )
        check_no_sample_twice(script.train(), other.train())


def _of_one_engine() -> list[Script]:
    engine = PrivacyEngine(accountant="rdp")
    return [Script(engine, own=True).train() for _ in range(3)]


def samples_of_loaders_of_one_engine() -> None:
    """The samples of three models that one engine makes private, with generators of equal
    seeds."""
    check_no_sample_twice(*_of_one_engine())


def noise_of_optimizers_of_one_engine() -> None:
    """The noise of three models that one engine makes private, with generators of equal seeds."""
    check_no_noise_twice(*_of_one_engine())


def noise_with_the_seed_of_the_samples() -> None:
    """Noise and samples from two generators with one seed."""
    script = Script(generators=[torch.Generator().manual_seed(7) for _ in range(2)])
    told_apart = script.optimizer.generator.initial_seed() != script.loader.generator.initial_seed()
    assert told_apart, "noise and samples are of one stream"


def samples_with_the_seed_of_the_weights() -> None:
    """Samples from a generator with the seed that torch's default one had when it made the
    weights."""
    script = Script(generators=[None, torch.Generator().manual_seed(0)])
    told_apart = script.loader.generator.initial_seed() != torch.initial_seed()
    assert told_apart, "weights and samples are of one stream"


def steps_of_a_copy_with_its_engine() -> None:
    """A script that is copied with all that it has made, and trained."""
    copied = copy.deepcopy(Script()).train()
    assert copied.steps == 2, f"the accountant has {copied.steps} of 2 steps"


def steps_with_a_hook_that_reads() -> None:
    """Two steps with a hook that logs what the accountant has counted."""
    script, seen = Script(), []
    accountant = script.engine.accountant
    script.optimizer.attach_step_hook(lambda _: seen.append(len(accountant.history)))
    script.train()
    assert script.steps == 2, f"the accountant has {script.steps} of 2 steps"


def steps_with_the_accountants_own_hook() -> None:
    """Two steps with the accountant's hook, attached by hand, and two with one that logs."""
    script = Script()
    own = script.engine.accountant.get_optimizer_hook_fn(sample_rate=0.25)
    script.optimizer.attach_step_hook(own)
    script.train()
    script.optimizer.attach_step_hook(lambda _: None)
    script.train()
    assert script.steps == 4, f"the accountant has {script.steps} of 4 steps"


def noise_in_a_loop_that_seeds() -> None:
    """Steps of a loop that sets torch's seed in each epoch."""
    script = Script()
    for _ in range(2):
        torch.manual_seed(0)
        script.train(1)
    check_no_noise_twice(script)


def steps_after_a_new_accountant() -> None:
    """Two steps with another accountant in the engine, if they are not refused."""
    script = Script()
    script.engine.accountant = create_accountant("rdp")
    try:
        script.train()
    except PrivacyViolationError:
        return
    assert script.steps == 2, f"the accountant has {script.steps} of 2 steps"


def steps_after_the_best_checkpoint() -> None:
    """Two steps, a checkpoint, two more steps, and the checkpoint loaded again."""
    script = Script().train()
    file = _checkpoint(script)
    script.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script.engine.load_checkpoint(path=file, **script.parts)
    assert script.steps == 4, f"the accountant has {script.steps} of 4 steps"


def steps_of_two_branches() -> None:
    """Two steps, and two branches from there with two steps each, of which one loads the other."""
    start = Script().train()
    branches = [Script() for _ in range(2)]
    for branch in branches:
        branch.engine.load_checkpoint(path=_checkpoint(start), **branch.parts)
        branch.train()
    one, other = branches
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.engine.load_checkpoint(path=_checkpoint(other), **one.parts)
    assert one.steps == 6, f"the accountant has {one.steps} of 6 steps"
