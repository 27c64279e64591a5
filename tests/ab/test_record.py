"""The results as a file, a table and a picture, from made-up measurements."""

import json
from dataclasses import replace

import pytest
from opacus_bpclip.ab.record import Record

from opacus_bpclip.ab import job, record
from opacus_bpclip.ab.plot import draw
from opacus_bpclip.ab.report import heading, render
from opacus_bpclip.ab.results import ArmResult, EpochResult, Plan, SeedResult, arm_from_dict
from opacus_bpclip.ab.settings import ARMS, NON_PRIVATE, Output, settings_for
from opacus_bpclip.jobs.errors import ArmError, UsageError

SETTINGS = settings_for(epochs=2, seeds=(0, 1), threads=1)
PLAN = Plan(
    sample_rate=1 / 12,
    steps_per_epoch=12,
    noise_multiplier=2.0166015625,
    epsilons=(0.7, 2.998),
    parameters=9258,
    train_examples=1437,
    test_examples=360,
)


def seed_result(seed, private, final):
    epochs = tuple(
        EpochResult(epoch, epsilon if private else None, accuracy, loss)
        for epoch, epsilon, accuracy, loss in [(1, 0.7, 0.5, 1.5), (2, 2.998, final, None)]
    )
    return SeedResult(
        seed=seed,
        epochs=epochs,
        epsilon=2.998 if private else None,
        seconds_per_step=0.004 + seed / 1000,
        peak_memory_bytes=(10 + seed) * 2**20,
    )


def arm_result(arm):
    private = arm != NON_PRIVATE
    return ArmResult(arm, (seed_result(0, private, 0.875), seed_result(1, private, 0.9)))


def finished(arms=ARMS):
    return Record(SETTINGS, PLAN, tuple(arm_result(arm) for arm in arms))


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """Spare each test the search for the noise multiplier."""
    monkeypatch.setattr(job, "load", lambda dataset, root: None)
    monkeypatch.setattr(job, "plan_for", lambda settings, data: PLAN)


class Trainer:
    """Stands in for training; remembers what it was asked for, and fails where told to."""

    def __init__(self, fail_at=None):
        self.asked = []
        self.fail_at = fail_at

    def __call__(self, name, settings, plan, *, progress=False):
        if name == self.fail_at:
            raise ArmError(f"the arm {name} failed: out of luck")
        self.asked.append(name)
        return replace(arm_result(name), seeds=arm_result(name).seeds[: len(settings.seeds)])


def test_table():
    assert render(finished()).splitlines()[:15] == [
        "digits: 1437 training and 360 test examples, model of 9,258 parameters",
        "epochs: 2, each of 12 Poisson batches, 120 examples expected, SGD with lr 0.1 and "
        "momentum 0.9, seeds 0 1",
        "target epsilon 3, max_grad_norm 1",
        "flat+input-clipping: max_input_norm 3",
        "backprop: allocation joint, bound exact, max_input_norm none",
        "backprop-layerwise: allocation dimension, bound exact, max_input_norm none",
        "paper: allocation dimension, bound product, max_input_norm 3",
        "",
        "arm                  accuracy         range  epsilon  delta  noise multiplier  "
        "time per step  peak memory",
        "non-private            88.75%  87.50..90.00        -      -                 -  "
        "      4.50 ms     11.0 MiB",
        "flat                   88.75%  87.50..90.00    2.998  1e-05             2.017  "
        "      4.50 ms     11.0 MiB",
        "flat+input-clipping    88.75%  87.50..90.00    2.998  1e-05             2.017  "
        "      4.50 ms     11.0 MiB",
        "backprop               88.75%  87.50..90.00    2.998  1e-05             2.017  "
        "      4.50 ms     11.0 MiB",
        "backprop-layerwise     88.75%  87.50..90.00    2.998  1e-05             2.017  "
        "      4.50 ms     11.0 MiB",
        "paper                  88.75%  87.50..90.00    2.998  1e-05             2.017  "
        "      4.50 ms     11.0 MiB",
    ]


def test_heading_names_the_options_of_the_arms_asked_for():
    settings = replace(SETTINGS, arms=("flat", "backprop"), max_input_norm=2.5, normalize=True)
    assert heading(Record(settings, PLAN)).splitlines()[3:] == [
        "backprop: allocation joint, bound exact, max_input_norm 2.5, normalize",
    ]


def test_table_of_unknown_memory_and_no_privacy():
    settings = replace(SETTINGS, arms=(NON_PRIVATE,))
    plan = replace(PLAN, noise_multiplier=None, epsilons=())
    seed = replace(seed_result(0, False, 0.9), peak_memory_bytes=None)
    text = render(Record(settings, plan, (ArmResult(NON_PRIVATE, (seed,)),)))
    assert "unknown" in text
    assert "target epsilon" not in text


def test_json_holds_every_fact():
    facts = json.loads(json.dumps(finished().as_dict(), allow_nan=False))
    assert facts["complete"] is True
    assert facts["settings"] == json.loads(json.dumps(vars(SETTINGS)))
    assert facts["plan"]["parameters"] == 9258
    for package in ("python", "torch", "opacus", "opacus_bpclip", "numpy", "torchvision"):
        assert facts["versions"][package]
    assert facts["platform"]
    assert list(facts["arms"]) == list(ARMS)
    backprop = facts["arms"]["backprop"]
    assert (backprop["accuracy_min"], backprop["accuracy_max"]) == (0.875, 0.9)
    assert backprop["accuracy_mean"] == pytest.approx(0.8875)
    assert (backprop["epsilon"], backprop["delta"]) == (2.998, 1e-5)
    assert backprop["noise_multiplier"] == 2.0166015625
    assert backprop["max_input_norm"] is None
    assert facts["arms"]["flat+input-clipping"]["max_input_norm"] == 3.0
    assert backprop["seconds_per_step"] == pytest.approx(0.0045)
    assert backprop["peak_memory_bytes"] == 11 * 2**20
    assert backprop["seeds"][1]["seed"] == 1
    assert backprop["seeds"][1]["epochs"][1] == {
        "epoch": 2,
        "epsilon": 2.998,
        "accuracy": 0.9,
        "loss": None,
    }
    public = facts["arms"][NON_PRIVATE]
    assert public["epsilon"] is public["delta"] is public["noise_multiplier"] is None


def test_arm_survives_json():
    result = arm_result("flat")
    assert arm_from_dict("flat", json.loads(json.dumps(result.as_dict()))) == result


def test_finished_arms_outlive_a_failure_and_are_resumed(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ArmError, match=r"the arm flat\+input-clipping failed: out of luck"):
        job.compare(SETTINGS, Output(json=path), train=Trainer(fail_at="flat+input-clipping"))
    held = json.loads(path.read_text())
    assert held["complete"] is False
    assert list(held["arms"]) == ["non-private", "flat"]
    trainer = Trainer()
    done = job.compare(SETTINGS, Output(json=path, resume=True), train=trainer)
    assert trainer.asked == list(ARMS[2:])
    assert done.is_complete
    assert json.loads(path.read_text()) == json.loads(json.dumps(done.as_dict()))
    assert list(tmp_path.iterdir()) == [path]


def test_resume_without_a_file_starts_afresh(tmp_path):
    trainer = Trainer()
    settings = replace(SETTINGS, arms=("flat",))
    job.compare(settings, Output(json=tmp_path / "new.json", resume=True), train=trainer)
    assert trainer.asked == ["flat"]


def test_without_resume_everything_is_trained_again(tmp_path):
    path = tmp_path / "results.json"
    record.write(finished(), path)
    trainer = Trainer()
    job.compare(SETTINGS, Output(json=path), train=trainer)
    assert trainer.asked == list(ARMS)


def test_resume_allows_more_arms_and_another_folder(tmp_path):
    path = tmp_path / "results.json"
    record.write(replace(finished(["flat"]), settings=replace(SETTINGS, arms=("flat",))), path)
    moved = replace(SETTINGS, data_root="elsewhere")
    assert record.resumed(Record(moved, PLAN), path).arms == (arm_result("flat"),)


def test_resume_refuses_other_settings(tmp_path):
    path = tmp_path / "results.json"
    record.write(finished(), path)
    changed = replace(SETTINGS, lr=0.2, seeds=(0, 1, 2))
    with pytest.raises(UsageError) as caught:
        record.resumed(Record(changed, PLAN), path)
    assert str(caught.value) == (
        f"cannot resume from {path}: lr 0.1 there, 0.2 now; seeds [0, 1] there, [0, 1, 2] now"
    )


def test_resume_refuses_other_versions(tmp_path):
    path = tmp_path / "results.json"
    record.write(finished(), path)
    facts = json.loads(path.read_text())
    facts["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"cannot resume from .*: torch 1\.0 there, \S+ now$"):
        record.resumed(Record(SETTINGS, PLAN), path)


def test_resume_refuses_an_older_format_whatever_its_settings(tmp_path):
    path = tmp_path / "results.json"
    record.write(finished(), path)
    facts = json.loads(path.read_text())
    facts["format"] = 1
    facts["settings"]["upstream"] = "clip"
    path.write_text(json.dumps(facts))
    with pytest.raises(UsageError) as caught:
        record.resumed(Record(SETTINGS, PLAN), path)
    assert str(caught.value) == f"cannot resume from {path}: format 1 there, 2 now"


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"settings": 1, "versions": 2}'])
def test_resume_refuses_other_files(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="it is not a results file of opacus-bpclip ab"):
        record.resumed(Record(SETTINGS, PLAN), path)


@pytest.mark.parametrize("arms", [ARMS, ("flat",), (NON_PRIVATE,)])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(arms, suffix, tmp_path):
    path = tmp_path / f"plot{suffix}"
    plan = PLAN if arms != (NON_PRIVATE,) else replace(PLAN, noise_multiplier=None, epsilons=())
    settings = replace(SETTINGS, arms=arms)
    draw(replace(finished(arms), settings=settings, plan=plan), path)
    start = path.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")
