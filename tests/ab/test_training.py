"""Real training, in this process and in a child: equal terms, and epsilon as Opacus counts it."""

from dataclasses import replace

import pytest
import torch
from opacus.accountants import PRVAccountant
from torch.utils.data import TensorDataset

from opacus_bpclip import BackpropClipCriterion
from opacus_bpclip.ab import job, training
from opacus_bpclip.ab.batches import Batch
from opacus_bpclip.ab.metrics import Accuracy, value_of
from opacus_bpclip.ab.privacy import domain_warning_silenced
from opacus_bpclip.ab.report import render
from opacus_bpclip.ab.results import Plan
from opacus_bpclip.ab.settings import ARMS, NON_PRIVATE, Settings
from opacus_bpclip.ab.study.runs import RunSettings
from opacus_bpclip.ab.task import task_of
from opacus_bpclip.jobs.errors import ChildError, JobError
from opacus_bpclip.jobs.memory import PeakMemory
from opacus_bpclip.jobs.quiet import known_warnings_silenced
from opacus_bpclip.jobs.running import measured
from opacus_bpclip.jobs.settings import Output
from opacus_bpclip.jobs.tables import TERMINAL
from tests.ab.results import arm_result

SHORT = {"epochs": 1, "epsilon": 1.0, "seeds": (0,), "threads": 1}
SETTINGS = Settings(**SHORT)


def call_here(function, *args):
    """Stand in for a process of its own."""
    return function(*args)


def opacus_epsilon(noise_multiplier, sample_rate, steps, delta):
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with domain_warning_silenced("prv"):
        return accountant.get_epsilon(delta=delta)


@pytest.fixture(scope="module")
def digits():
    return task_of(SETTINGS)


@pytest.fixture(scope="module")
def plan(digits):
    return job.plan_for(SETTINGS, digits)


def test_plan_meets_the_target(plan):
    assert (plan.steps_per_epoch, plan.sample_rate) == (12, 1 / 12)
    assert (plan.train_examples, plan.test_examples, plan.parameters) == (1437, 360, 9258)
    assert 0.98 < plan.epsilons[-1] <= 1.0


def test_the_loader_decides_the_number_of_steps(digits):
    # 1 / (1 / 93) is a little less than 93: Opacus's loader draws 92 batches, not 93.
    settings = SETTINGS.replace(batch_size=2, epochs=2)
    subset = replace(digits, train=TensorDataset(*digits.train[:185]))
    plan = job.plan_for(settings, subset)
    assert (plan.steps_per_epoch, plan.sample_rate) == (92, 1 / 92)
    assert training.train_seed("backprop", 0, settings, plan, subset, False).epsilon <= 1.0


def test_all_arms_end_to_end(monkeypatch):
    monkeypatch.setattr(job, "call_in_child", call_here)
    done = measured(job.Comparison(SETTINGS), Output())
    assert done.complete
    expected = opacus_epsilon(done.plan.noise_multiplier, 1 / 12, 12, 1e-5)
    for name in ARMS:
        arm = done.result(name)
        (epoch,) = arm.seeds[0].epochs
        assert 0 <= epoch.metric <= 1
        assert 0 < epoch.loss < 10
        assert arm.seconds_per_step > 0
        if name == NON_PRIVATE:
            assert arm.epsilon is epoch.epsilon is None
        else:
            assert arm.epsilon == epoch.epsilon == expected <= 1.0


def test_arms_start_alike_and_see_the_same_batches(digits, plan):
    weights, batches = [], []
    for name in ARMS:
        arm = training.start(name, 5, SETTINGS, plan, digits)
        weights.append(torch.cat([p.detach().flatten() for p in arm.model.parameters()]))
        images = [images for images, _ in arm.loader]
        assert len(images) == plan.steps_per_epoch
        batches.append(torch.cat(images))
    for other in range(1, len(ARMS)):
        assert torch.equal(weights[0], weights[other])
        assert torch.equal(batches[0], batches[other])


@pytest.mark.parametrize("name", ["flat", "backprop", "paper"])
def test_bfloat16_trains_to_about_the_same_weights(digits, plan, name):
    ends = []
    for precision in ("float32", "bfloat16"):
        arm = training.start(name, 5, SETTINGS.replace(precision=precision), plan, digits)
        with known_warnings_silenced():
            for batch in arm.loader:
                training.step(arm, Batch.of(batch, arm.device))
        ends.append(torch.cat([p.detach().flatten() for p in arm.model.parameters()]))
    assert 0 < (ends[0] - ends[1]).norm() <= 0.02 * ends[0].norm()


@pytest.mark.parametrize("options", [{"threshold": {}}, {"propagate": "unclipped"}])
def test_options_that_need_a_criterion_get_one(digits, plan, options):
    name = "backprop-layerwise"
    settings = RunSettings(arms=(name,), options=options, **SHORT)
    arm = training.start(name, 5, settings, plan, digits)
    assert isinstance(arm.criterion, BackpropClipCriterion)


def test_private_arms_draw_noise_of_the_same_scale(digits, plan):
    quiet = SETTINGS.replace(lr=1e-30)
    for name in ARMS[1:]:
        arm = training.start(name, 5, quiet, plan, digits)
        empty = tuple(tensor[:0] for tensor in digits.train.tensors)
        with known_warnings_silenced():
            training.step(arm, Batch.of(empty, arm.device))
        drawn = torch.cat([p.grad.flatten() for p in arm.model.parameters()])
        assert drawn.std().item() == pytest.approx(plan.noise_multiplier / 119, rel=0.05)


@pytest.mark.parametrize("name", ARMS)
def test_runs_can_be_repeated(name, digits, plan):
    first, second = (training.train_seed(name, 3, SETTINGS, plan, digits, False) for _ in range(2))
    assert first.epochs == second.epochs


@pytest.mark.parametrize("name", ARMS)
def test_empty_batches(name, digits):
    # Three examples at rate 1/3: three batches in ten are empty.
    few = replace(digits, train=TensorDataset(*digits.train[:3]))
    settings = SETTINGS.replace(batch_size=1, epochs=8)
    plan = Plan(1 / 3, 3, 1.0, (1.0,) * 8, 9258, 3, 360)
    result = training.train_seed(name, 0, settings, plan, few, False)
    assert len(result.epochs) == 8
    assert all(epoch.loss is not None for epoch in result.epochs)


def test_progress_bar_goes_to_stderr(digits, plan, capsys):
    training.train_seed("flat", 0, SETTINGS, plan, digits, True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flat, seed 0 ")
    assert "100%" in err
    assert "loss=" in err
    assert f"epsilon={plan.epsilons[-1]:.3f}" in err


def test_an_accountant_charged_otherwise_is_found(digits, plan):
    wrong = replace(plan, steps_per_epoch=11)
    with pytest.raises(JobError) as caught:
        training.train_seed("flat", 0, SETTINGS, wrong, digits, False)
    noise = plan.noise_multiplier
    assert str(caught.value) == (
        "the accountant was charged (noise multiplier, sample rate, steps) "
        f"[({noise}, {1 / 12}, 12)] where training took [({noise}, {1 / 12}, 11)]"
    )


def test_accuracy_leaves_the_model_training(digits):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    share = value_of(Accuracy(), model, digits.test_batches(100), torch.device("cpu"))
    assert share * 360 == pytest.approx(round(share * 360))
    assert model.training


def test_peak_memory_counts_what_is_gone_again():
    memory = PeakMemory(torch.device("cpu"))
    assert memory.bytes is None
    with memory.watch():
        torch.ones(2**24)  # 64 MiB
    with memory.watch():
        pass
    unwatched = torch.ones(2**25)
    assert unwatched.numel() == 2**25
    assert 60 * 2**20 < memory.bytes < 100 * 2**20


def test_an_arm_that_fails_in_training_leaves_a_note_and_the_others_train(monkeypatch):
    def fail(function, arm, *args):
        if arm == "flat":
            raise ChildError("its process was ended by SIGKILL")
        return arm_result(arm)

    monkeypatch.setattr(job, "call_in_child", fail)
    monkeypatch.setattr(job.trial, "problem_of", lambda *args: "")
    comparison = job.Comparison(SETTINGS.replace(arms=("flat", "backprop")))
    done = measured(comparison, Output(progress=False))
    note = "flat failed in training: its process was ended by SIGKILL"
    assert render(done, TERMINAL).endswith(f"\n\n{note}")
    assert [bool(result.seeds) for result in done.asked] == [False, True]
    assert comparison.status(done) == 1
    assert comparison.todo(done) == ["flat"]  # tried again when the run is continued
