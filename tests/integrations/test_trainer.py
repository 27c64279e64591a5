"""Hugging Face's trainer trains privately: its claim, steps, checkpoints and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from opacus_bpclip.integrations.transformers import PrivacyArguments, PrivateTrainer
from tests.integrations.plain import PRIVACY, check_moved, flat
from tests.integrations.tiny import TOKENS, Texts, arguments, bert, gpt2, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def summed(folder: Path, count: int, *, clip: float = 1e-2, **options: Any) -> Tensor:
    """Return the sum that one step on all examples releases, without noise."""
    model = bert()
    before = flat(model)
    # One batch holds all of them, so each is sampled for certain.
    run = trainer(
        folder,
        model=model,
        data=Texts(count),
        privacy={"noise_multiplier": 0.0},
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
        max_grad_norm=clip,
        max_steps=1,
        **options,
    )
    run.train()
    assert run.engine.accountant.history == [(0.0, 1.0, 1)]
    return (before - flat(model)) * count


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 12},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6},
    ],
    ids=["whole", "parts"],
)
def test_one_example_moves_a_step_by_no_more_than_the_claim(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    check_moved(summed(tmp_path, 6, **options) - summed(tmp_path, 5, **options), 1e-2)


def test_physical_batches_add_up_to_their_logical_batch(tmp_path: Path) -> None:
    whole = summed(tmp_path, 6, clip=1.0, per_device_train_batch_size=6)
    parts = summed(
        tmp_path, 6, clip=1.0, per_device_train_batch_size=2, gradient_accumulation_steps=3
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [bert, gpt2])
def test_a_run_spends_its_target_in_the_steps_that_are_planned(tmp_path: Path, model: Any) -> None:
    run = trainer(
        tmp_path,
        model=model(),
        data=Texts(32, next_token=model is gpt2),
        privacy={"noise_multiplier": None, "target_epsilon": 6.0},
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        logging_steps=4,
        eval_strategy="epoch",
    )
    run.train()
    ((_, rate, steps),) = run.engine.accountant.history
    assert (rate, steps, run.state.global_step) == (0.25, 8, 8)
    assert 5.98 < run.epsilon <= 6.0
    logged = [entry["epsilon"] for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert logged[0] < logged[1] == run.epsilon
    assert not any("grad_norm" in entry for entry in run.state.log_history)


def test_bfloat16_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True, max_steps=2)
    before = flat(run.model)
    run.train()
    assert run._spending.steps == 2
    assert flat(run.model).isfinite().all()
    assert not torch.equal(before, flat(run.model))


def test_training_stops_before_the_step_that_would_exceed_the_target(tmp_path: Path) -> None:
    run = trainer(tmp_path, privacy={"target_epsilon": 3.0}, num_train_epochs=2)
    run.train()
    ((noise, rate, steps),) = run.engine.accountant.history
    assert run.epsilon <= 3.0
    assert 0 < steps == run.state.global_step < 16
    assert run._spending._epsilon_of([(noise, rate, steps + 1)]) > 3.0
    with pytest.raises(
        ValueError, match=r"one more step would exceed target_epsilon=3\.0\. Pass a"
    ):
        run.train()
    assert run._spending.steps == steps


def test_a_checkpoint_keeps_what_was_spent(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    saved = json.loads((tmp_path / "checkpoint-6/privacy.json").read_text())
    assert saved["history"] == [[1.0, 0.125, 6]]
    assert 0 < saved["epsilon"] < run.epsilon

    resumed = trainer(tmp_path / "resumed")
    checkpoint = tmp_path / "checkpoint-8"
    assert checkpoint.exists()
    resumed.args.num_train_epochs = 2
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 16
    assert resumed.engine.accountant.history == [(1.0, 0.125, 16)]
    assert resumed.epsilon > run.epsilon


def test_a_branch_counts_the_steps_of_the_branches_beside_it(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    branch = trainer(tmp_path)
    branch.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # Eight steps were taken, and five again from the third on.
    assert branch._spending.steps == 13


def test_an_empty_sample_is_a_step_for_which_the_model_does_not_run(tmp_path: Path) -> None:
    seen: list[int] = []
    model = bert()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    run = trainer(
        tmp_path,
        model=model,
        privacy={"sampling_generator": torch.Generator().manual_seed(0)},
        per_device_train_batch_size=1,
        max_steps=8,
        logging_steps=1,
    )
    run.train()
    empty = [entry["step"] for entry in run.state.log_history if entry.get("loss") == 0.0]
    assert empty
    assert 0 not in seen
    assert run.engine.accountant.history == [(1.0, 1 / 32, 8)]


def test_runs_that_are_seeded_alike_draw_other_noise(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, max_steps=1, seed=7, per_device_train_batch_size=32) for _ in "ab"]
    for run in runs:
        run.train()
    assert not torch.equal(flat(runs[0].model), flat(runs[1].model))


def test_evaluation_is_the_librarys_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    stock = hf.Trainer(model=run.model, args=arguments(tmp_path), eval_dataset=Texts(8))
    assert run.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size begins again after an out-of-"),
        ({"train_sampling_strategy": "group_by_length"}, "Leave train_sampling_strategy out."),
        ({"fp16": True}, "fp16 needs a GradScaler"),
        ({"torch_compile": True}, "Leave torch_compile out. In a loop of your own, compile what"),
        ({"max_grad_norm": 0.0}, "Expected max_grad_norm=0.0 to be a finite number > 0."),
    ],
)
def test_arguments_that_do_not_go_with_privacy_are_refused(
    tmp_path: Path, option: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        trainer(tmp_path, max_steps=1, **option).train()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_delta": 1e-5}, "Expected a target_epsilon, for which the noise is chosen, a"),
        ({"target_delta": 1.0, "target_epsilon": 1.0}, "Expected target_delta=1.0 to be between"),
        ({"target_delta": 1e-5, "target_epsilon": -1}, "Expected target_epsilon=-1 to be a finite"),
    ],
)
def test_impossible_privacy_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        PrivacyArguments(**options)


class Pairs(Texts):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        return {**item, "labels": item["input_ids"]}


class PrivateSeq2SeqTrainer(PrivateTrainer, hf.Seq2SeqTrainer):
    pass


@pytest.mark.slow  # trials find the functions that T5 calls on its position tables
def test_a_trainer_of_another_kind_combines_with_it(tmp_path: Path) -> None:
    config = hf.T5Config(
        vocab_size=TOKENS,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "max_steps": 2}
    run = PrivateSeq2SeqTrainer(
        model=hf.T5ForConditionalGeneration(config),
        args=hf.Seq2SeqTrainingArguments(
            **args, per_device_train_batch_size=4, predict_with_generate=True
        ),
        train_dataset=Pairs(16, positions=False),
        eval_dataset=Pairs(4, positions=False),
        compute_metrics=lambda found: {"axes": found.predictions.ndim},
        privacy=PrivacyArguments(**PRIVACY),
    )
    run.train()
    assert run.engine.accountant.history == [(1.0, 0.25, 2)]
    assert run.evaluate()["eval_axes"] == 2  # generated tokens; logits have three
