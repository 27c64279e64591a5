"""What a Hugging Face run does with its planned steps: resumed, stopped, finished, or not begun."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from opacus_bpclip import CrossEntropy
from opacus_bpclip.integrations.transformers import PrivacyArguments, PrivateTrainer
from tests.integrations.tiny import PRIVACY, Texts, arguments, bert, trainer

# Opacus's search for the noise, of so few examples.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")

TARGET = {"noise_multiplier": None, "target_epsilon": 6.0}


class EndsAt(hf.TrainerCallback):
    """Interrupts a run at a step: after it was saved, if it is."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.step % 2:
            raise KeyboardInterrupt

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def planned(folder: Path, **options: Any) -> PrivateTrainer:
    """Return a run of 8 steps that saves after each second one."""
    usual = {"save_strategy": "steps", "save_steps": 2, "privacy": TARGET}
    return trainer(folder, **usual | options)


def interrupted(folder: Path, step: int) -> tuple[float, float, int]:
    """Interrupt a run, and return what it has spent until then."""
    run = planned(folder)
    run.add_callback(EndsAt(step))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    ((noise, rate, steps),) = run.engine.accountant.history
    assert (rate, steps) == (1 / 8, step)
    return noise, rate, steps


def test_a_resumed_run_keeps_its_noise(tmp_path: Path) -> None:
    noise, rate, _ = interrupted(tmp_path, 4)
    run = planned(tmp_path)
    run.train(resume_from_checkpoint=True)
    assert run.engine.accountant.history == [(noise, rate, 8)]
    assert 5.9 < run.epsilon <= 6.0


@pytest.mark.parametrize(("target", "louder"), [(6.0, True), (9.0, False)])
def test_the_steps_that_are_left_get_the_noise_with_which_they_fit(
    tmp_path: Path, target: float, louder: bool
) -> None:
    """Also where a step after the checkpoint is spent, and where the target is another one."""
    before = interrupted(tmp_path, 5)
    run = planned(tmp_path, privacy=TARGET | {"target_epsilon": target})
    with pytest.warns(UserWarning, match="saved under other settings: noise_multiplier was"):
        run.train(resume_from_checkpoint=True)
    first, (noise, rate, steps) = run.engine.accountant.history
    assert first == before
    assert (rate, steps, run.state.global_step) == (1 / 8, 4, 8)
    assert (noise > before[0]) == louder
    assert target - 0.1 < run.epsilon <= target


@pytest.mark.parametrize(
    ("plan", "again", "count"),
    [
        ({}, {}, 8),
        ({"max_steps": 12}, {"max_steps": 12}, 12),
        ({"num_train_epochs": 1.5}, {"num_train_epochs": 1.5}, 12),
        ({"max_steps": 6}, {"max_steps": 5}, 6),
    ],
)
def test_a_run_that_is_finished_takes_no_step_more(
    tmp_path: Path, plan: dict[str, Any], again: dict[str, Any], count: int
) -> None:
    """However often it is resumed, also in the middle of an epoch."""
    planned(tmp_path, **plan).train()
    for _ in range(2):
        run = planned(tmp_path, **again)
        weights = torch.nn.utils.parameters_to_vector(run.model.parameters())
        assert run.train(resume_from_checkpoint=True).global_step == count
        ((_, _, steps),) = run.engine.accountant.history
        assert (steps, run.state.global_step) == (count, count)
        assert run.epsilon <= 6.0
        loaded = torch.nn.utils.parameters_to_vector(run.model.parameters())
        assert not torch.equal(loaded, weights)


def test_a_finished_run_with_more_steps_to_take_has_none_left(tmp_path: Path) -> None:
    planned(tmp_path).train()
    with pytest.raises(ValueError, match="one more step would exceed target_epsilon"):
        planned(tmp_path, num_train_epochs=2).train(resume_from_checkpoint=True)


def test_a_run_that_stops_early_says_so_evaluates_and_saves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("opacus_bpclip"), "propagate", True)
    options = {"save_steps": 100, "eval_strategy": "steps", "eval_steps": 100}
    run = planned(tmp_path, privacy={"target_epsilon": 3.0}, num_train_epochs=2, **options)
    run.train()
    stopped = run.state.global_step
    assert 0 < stopped < 16
    assert f"Training stops at step {stopped} of 16: it has spent an epsilon of 2." in caplog.text
    assert (tmp_path / f"checkpoint-{stopped}/privacy.json").exists()
    assert [entry["step"] for entry in run.state.log_history if "eval_loss" in entry] == [stopped]


class Weighted(PrivateTrainer):
    """Computes the loss by itself, as the library's documentation shows it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels)


class Watching(PrivateTrainer):
    """Looks at the loss, and leaves it as it is."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.seen: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return self.seen


def made(folder: Path, kind: type[PrivateTrainer] = PrivateTrainer, **options: Any) -> Any:
    given = {"train_dataset": Texts(32), "privacy": PrivacyArguments(**PRIVACY)} | options
    return kind(model=bert(), args=arguments(folder, max_steps=1), **given)


def test_a_loss_that_is_computed_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Weighted\.compute_loss does not call .* pass compute_l"):
        made(tmp_path, Weighted).train()
    watching = made(tmp_path, Watching)
    watching.train()
    assert watching.seen.dim() == 0


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Texts(4))


def test_what_has_no_loss_of_each_example_or_no_items_is_refused(tmp_path: Path) -> None:
    weights = torch.tensor([1.0, 2.0, 1.0])
    for loss in (lambda outputs, labels, **_: outputs.logits.sum(), nn.Identity()):
        with pytest.raises(ValueError, match=r"^compute_loss_func=.* has no attribute `reduction`"):
            made(tmp_path, compute_loss_func=loss)
    classes = bert().config.num_labels
    made(tmp_path, compute_loss_func=CrossEntropy(weight=weights[:classes])).train()
    with pytest.raises(ValueError, match="train_dataset is a stream"):
        made(tmp_path, train_dataset=Stream())


def test_a_delta_that_publishes_an_example_is_told(tmp_path: Path) -> None:
    run = made(tmp_path, privacy=PrivacyArguments(**PRIVACY | {"target_delta": 1 / 32}))
    with pytest.warns(UserWarning, match=r"target_delta=0\.03125 is not below 1 / 32"):
        run.train()
