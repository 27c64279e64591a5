"""Whatever is resumed, and from wherever, all steps that a run has taken on its data count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tests.integrations import tiny, tiny_lightning
from tests.integrations.tiny import Texts
from tests.integrations.tiny_lightning import Net, data

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def fit(root: Path, checkpoint: Any = None, *, net: Net | None = None, **options: Any) -> Any:
    """Fit with Lightning on four samples an epoch."""
    run = tiny_lightning.trainer(root, **options)
    run.fit(net or Net(), data(32, batch_size=8), data(8, batch_size=8), ckpt_path=checkpoint)
    return run


def train(folder: Path, checkpoint: Any = None, **options: Any) -> Any:
    """Train with Hugging Face's trainer on two samples an epoch."""
    run = tiny.trainer(folder, data=Texts(8), **options)
    run.train(resume_from_checkpoint=checkpoint)
    return run


def counted(run: Any) -> int:
    ((_, _, steps),) = run.engine.accountant.history
    return steps


def test_a_checkpoint_is_restored_by_any_kind_of_path(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="epoch")
    assert counted(train(tmp_path, tmp_path / "checkpoint-2", num_train_epochs=2)) == 4


def test_a_path_to_a_checkpoint_without_a_history_is_refused(tmp_path: Path) -> None:
    train(tmp_path, save_strategy="epoch")
    (tmp_path / "checkpoint-2/privacy.json").unlink()
    with pytest.raises(ValueError, match=r"has no privacy\.json"):
        train(tmp_path, tmp_path / "checkpoint-2", num_train_epochs=2)


class First(Net):
    """The first checkpoint stays the best."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", float(self.global_step), batch_size=1)


def test_steps_after_the_best_checkpoint_count(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="loss")
    fit(tmp_path, net=First(), max_epochs=3, callbacks=[best], enable_checkpointing=True)
    assert Path(best.best_model_path).name == "epoch=0-step=4.ckpt"
    assert counted(fit(tmp_path, best.best_model_path)) == 12 + 4


def test_steps_after_hugging_faces_best_checkpoint_count(tmp_path: Path) -> None:
    losses = iter([1.0, 2.0, 3.0])
    run = tiny.trainer(
        tmp_path,
        data=Texts(8),
        num_train_epochs=3,
        save_strategy="best",
        eval_strategy="epoch",
        metric_for_best_model="loss_now",
        greater_is_better=False,
    )
    run.compute_metrics = lambda _: {"loss_now": next(losses)}
    run.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert counted(train(tmp_path, tmp_path / "checkpoint-2", num_train_epochs=2)) == 6 + 2


class Failing(Net):
    """Fails in its seventh step."""

    def training_step(self, batch: Any, index: int) -> Any:
        if len(self.seen) == 6:
            raise RuntimeError("the sixth was the last")
        return super().training_step(batch, index)


def test_steps_before_an_error_count(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path)
    with pytest.raises(RuntimeError, match="the sixth"):
        fit(tmp_path, net=Failing(), callbacks=[saved], enable_checkpointing=True)
    assert counted(fit(tmp_path, saved.best_model_path)) == 6 + 4


def test_steps_that_are_left_of_a_fit_get_the_noise_with_which_they_fit(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path)
    privacy = {"noise_multiplier": None, "target_epsilon": 6.0}
    with pytest.raises(RuntimeError, match="the sixth"):
        fit(tmp_path, net=Failing(), callbacks=[saved], enable_checkpointing=True, privacy=privacy)
    run = fit(tmp_path, saved.best_model_path, privacy=privacy)
    (noise, rate, taken), (louder, same, left) = run.engine.accountant.history
    assert (taken, left, rate) == (6, 4, same)
    assert noise < louder < 2 * noise
    assert 5.9 < run.epsilon <= 6.0


def test_steps_before_an_error_of_hugging_faces_trainer_count(tmp_path: Path) -> None:
    class Fails(hf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("the third was the last")

    run = tiny.trainer(tmp_path, data=Texts(8), num_train_epochs=2, save_strategy="epoch")
    run.add_callback(Fails())
    with pytest.raises(RuntimeError, match="the third"):
        run.train()
    assert counted(train(tmp_path, tmp_path / "checkpoint-2", num_train_epochs=2)) == 3 + 2


def test_branches_in_lightnings_own_folders_count(tmp_path: Path) -> None:
    def versions(checkpoint: Any = None, **options: Any) -> Any:
        callbacks = [ModelCheckpoint(save_top_k=-1)]
        logger = CSVLogger(tmp_path)
        return fit(
            tmp_path,
            checkpoint,
            logger=logger,
            callbacks=callbacks,
            enable_checkpointing=True,
            **options,
        )

    first = versions(max_epochs=1).checkpoint_callback.best_model_path
    assert "version_0/checkpoints" in first
    assert [counted(versions(first)) for _ in range(3)] == [8, 12, 16]


def test_branches_that_train_at_the_same_time_add_up(tmp_path: Path) -> None:
    start, end = tmp_path / "start.ckpt", tmp_path / "end.ckpt"
    fit(tmp_path, max_epochs=1).save_checkpoint(start)

    class Meanwhile(L.Callback):
        def on_fit_start(self, *_: Any) -> None:
            fit(tmp_path, start)

    fit(tmp_path, start, callbacks=[Meanwhile()]).save_checkpoint(end)
    assert counted(fit(tmp_path, end, max_epochs=3)) == 4 + 4 + 4 + 4


def test_another_run_in_the_folder_takes_nothing_away(tmp_path: Path) -> None:
    run = fit(tmp_path, max_epochs=1)
    run.save_checkpoint(tmp_path / "four.ckpt")
    run.fit_loop.max_epochs = 3
    run.fit(Net(), data(32, batch_size=8))
    for each in (run, fit(tmp_path, max_steps=1)):
        each.save_checkpoint(tmp_path / "last.ckpt")
    assert counted(fit(tmp_path, tmp_path / "four.ckpt")) == counted(run) + 4


class WithTest(Net):
    def test_step(self, batch: Any, index: int) -> None:
        self.log("rows", float(len(batch[0])))


def test_a_test_on_another_runs_checkpoint_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    fit(tmp_path).save_checkpoint(tmp_path / "other.ckpt")
    run = fit(tmp_path, max_epochs=1)
    run.save_checkpoint(tmp_path / "four.ckpt")
    run.test(WithTest(), data(8, batch_size=8), ckpt_path=tmp_path / "other.ckpt", verbose=False)
    assert counted(run) == 4
    run.fit_loop.max_epochs = 2
    run.fit(Net(), data(32, batch_size=8))
    assert counted(fit(tmp_path, tmp_path / "four.ckpt")) == counted(run) + 4


def test_a_copied_checkpoint_counts_its_own_steps(tmp_path: Path) -> None:
    fit(tmp_path / "here").save_checkpoint(tmp_path / "here/x.ckpt")
    train(tmp_path / "here", save_strategy="epoch")
    shutil.rmtree(tmp_path / "here/privacy")
    (tmp_path / "here").rename(tmp_path / "there")
    assert counted(fit(tmp_path, tmp_path / "there/x.ckpt", max_epochs=3)) == 12
    folder = tmp_path / "there/checkpoint-2"
    assert counted(train(tmp_path, folder, num_train_epochs=2)) == 4
