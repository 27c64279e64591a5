"""Training that begins again: from a checkpoint, in a copy, or with the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from opacus_bpclip.engine import account, sources
from opacus_bpclip.engine.account import Account
from opacus_bpclip.engine.segments import Segments, total
from opacus_bpclip.engine.sources import Sources
from opacus_bpclip.optimizer import wrapper
from opacus_bpclip.optimizer.accounting import AccountStep
from opacus_bpclip.optimizer.wrapper import OptimizerWrapper
from opacus_bpclip.sampling import loader, sampler
from opacus_bpclip.sampling.sampler import CountedSampler
from tests.mutants import resuming_killers as killers
from tests.mutants.registry import mutant


@mutant(killed_by=killers.noise_of_a_resumed_script, says="the same noise was drawn twice")
@mutant(killed_by=killers.samples_of_a_resumed_script, says="the same sample was drawn twice")
def seeds_after_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """A script with a fixed seed goes on from a checkpoint with the numbers that it has drawn
    before it: the difference of two releases has no noise."""
    patch.setattr(OptimizerWrapper, "_renew", lambda self: None)


@mutant(killed_by=killers.noise_of_two_resumes_by_hand, says="the same noise was drawn twice")
def noise_that_goes_on_from_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds the state of the noise's generator, and a resumed run goes on from there:
    two runs from one checkpoint draw the same noise."""
    save, load = OptimizerWrapper.state_dict, OptimizerWrapper.load_state_dict

    def state_dict(self: OptimizerWrapper) -> dict[str, Any]:
        assert self.generator is not None
        return {**save(self), "generator": self.generator.get_state()}

    def load_state_dict(self: OptimizerWrapper, state: Mapping[str, Any]) -> None:
        state = dict(state)
        own = state.pop("generator")
        load(self, state)
        assert self.generator is not None
        self.generator.set_state(own)

    patch.setattr(OptimizerWrapper, "state_dict", state_dict)
    patch.setattr(OptimizerWrapper, "load_state_dict", load_state_dict)


@mutant(killed_by=killers.samples_of_a_resumed_script, says="the same sample was drawn twice")
def samples_of_the_seed_after_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """After a checkpoint the noise is new, and the samples are those from before it: the accountant
    takes two steps on one sample for independent ones."""
    patch.setattr(CountedSampler, "renew", lambda self: None)


@mutant(killed_by=killers.noise_of_a_resumed_script, says="the same noise was drawn twice")
def noise_by_the_steps_that_were_taken(patch: pytest.MonkeyPatch) -> None:
    """A loaded checkpoint seeds the noise by a public number, such as that of the steps: two runs
    from it draw the same noise."""

    def counted(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
        return (generator or torch.Generator(device)).manual_seed(3)

    patch.setattr(wrapper, "renewed", counted)


@mutant(killed_by=killers.samples_of_copies, says="the same sample was drawn twice")
def sampling_generator_copied(patch: pytest.MonkeyPatch) -> None:
    """The copy of a loader has a copy of its generator: both train on the same samples, which the
    accountant takes for independent ones."""
    shared = sampler.sharing

    def copied(original: Any, generator: torch.Generator | None, memo: dict[int, Any]) -> Any:
        return shared(original, None, memo)

    for module in (sampler, loader):
        patch.setattr(module, "sharing", copied)


@mutant(killed_by=killers.samples_of_copies, says="the same sample was drawn twice")
def sampling_generator_pickled(patch: pytest.MonkeyPatch) -> None:
    """What was pickled draws the samples that the original goes on to draw."""
    patch.delattr(CountedSampler, "__setstate__")
    patch.setattr(OptimizerWrapper, "_renew", lambda self: None)


@mutant(killed_by=killers.samples_of_loaders_of_one_engine, says="the same sample was drawn twice")
@mutant(killed_by=killers.noise_of_optimizers_of_one_engine, says="the same noise was drawn twice")
def generators_as_the_user_seeds_them(patch: pytest.MonkeyPatch) -> None:
    """Two models that one engine makes private with equal seeds draw the same samples and the same
    noise."""
    patch.setattr(Sources, "own", lambda self, generator, device, purpose: generator)


@mutant(killed_by=killers.samples_of_loaders_of_one_engine, says="the same sample was drawn twice")
def later_loaders_not_numbered(patch: pytest.MonkeyPatch) -> None:
    """The later loaders of an engine are told from the first one, and not from each other."""
    apart = sources.apart
    patch.setattr(sources, "apart", lambda *args: apart(*args[:-1], 1))


@mutant(killed_by=killers.noise_with_the_seed_of_the_samples, says="are of one stream")
def noise_in_the_stream_of_samples(patch: pytest.MonkeyPatch) -> None:
    """The noise is made of the numbers that have chosen the sample, and tells who is in it."""
    patch.setattr(sources, "are_alike", lambda one, other: False)


@mutant(killed_by=killers.steps_after_the_best_checkpoint, says="the accountant has 2 of 4 steps")
def history_replaced_by_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """Loading an earlier state of the model makes the accountant forget the steps after it, which
    were taken on the data all the same."""
    patch.setattr(Account, "keep", lambda self, before, saved: None)


@mutant(killed_by=killers.steps_of_two_branches, says="the accountant has 4 of 6 steps")
def larger_history_alone(patch: pytest.MonkeyPatch) -> None:
    """Of the accountant's steps and a checkpoint's only the larger number counts, also where each
    has steps that the other lacks."""

    def larger(reports: Sequence[Segments]) -> Segments:
        return max(reports, key=lambda segments: total(segments).total())

    patch.setattr(account, "union", larger)


@mutant(killed_by=killers.samples_with_the_seed_of_the_weights, says="are of one stream")
def samples_in_the_stream_of_the_weights(patch: pytest.MonkeyPatch) -> None:
    """The samples are chosen by the numbers that have made the initial weights, and who knows these
    can tell who is in it."""
    alike = sources.are_alike
    patch.setattr(sources, "are_alike", lambda one, other: other is not None and alike(one, other))


@mutant(killed_by=killers.steps_of_a_copy_with_its_engine, says="the accountant has 0 of 2 steps")
def copies_counted_by_the_original_alone(patch: pytest.MonkeyPatch) -> None:
    """The copy of an optimizer counts for the original's accountant, and the engine that is copied
    with it has an accountant of its own, which stays empty."""

    def own(self: AccountStep, memo: dict[int, Any]) -> AccountStep:
        return AccountStep(self.accountant, self.sample_rate, self.then)

    patch.setattr(AccountStep, "__deepcopy__", own)


@mutant(killed_by=killers.steps_with_a_hook_that_reads, says="the accountant has 0 of 2 steps")
def hooks_that_read_taken_for_the_accountants(patch: pytest.MonkeyPatch) -> None:
    """A step hook that only reads the accountant replaces the one by which it counts."""
    with_hook = AccountStep.with_hook

    def by_what_it_holds(self: AccountStep, fn: Any) -> Any:
        return fn if getattr(fn, "__closure__", None) else with_hook(self, fn)

    patch.setattr(AccountStep, "with_hook", by_what_it_holds)


@mutant(
    killed_by=killers.steps_with_the_accountants_own_hook, says="the accountant has 2 of 4 steps"
)
def an_accountants_own_hook_is_as_any_other(patch: pytest.MonkeyPatch) -> None:
    """The hook by which an accountant counts, attached by hand, goes when another is attached."""
    patch.setattr(AccountStep, "of", lambda fn: fn if isinstance(fn, AccountStep) else None)
    patch.setattr(AccountStep, "with_hook", lambda self, fn: fn)


@mutant(killed_by=killers.noise_in_a_loop_that_seeds, says="the same noise was drawn twice")
def noise_of_torchs_default_generator(patch: pytest.MonkeyPatch) -> None:
    """The noise is of the generator that a data set or the training loop seeds again."""
    default = torch.default_generator
    patch.setattr(Sources, "own", lambda self, generator, device, purpose: generator or default)


@mutant(killed_by=killers.steps_after_a_new_accountant, says="the accountant has 0 of 2 steps")
def replaced_accountants_unnoticed(patch: pytest.MonkeyPatch) -> None:
    """The engine gets another accountant after `make_private`, and steps are counted by the one
    before, without a word."""
    patch.setattr(AccountStep, "_present_engine", None)
