"""Every step of Lightning's trainer is private, and within the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, Timer
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from opacus_bpclip.errors import PrivacyViolationError
from tests.integrations.plain import flat
from tests.integrations.tiny_lightning import Net, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


class OwnLoader(Net):
    batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return data(8, batch_size=self.batch_size)


def find_lr(folder: Path) -> None:
    Tuner(trainer(folder)).lr_find(OwnLoader())


def find_batch_size(folder: Path) -> None:
    Tuner(trainer(folder)).scale_batch_size(OwnLoader(), max_trials=1)


def fit_with_lr_finder(folder: Path) -> None:
    trainer(folder, callbacks=[LearningRateFinder()]).fit(OwnLoader())


def fit_with_batch_size_finder(folder: Path) -> None:
    trainer(folder, callbacks=BatchSizeFinder(max_trials=1)).fit(OwnLoader())


@pytest.mark.parametrize(
    "find", [find_lr, find_batch_size, fit_with_lr_finder, fit_with_batch_size_finder]
)
def test_finders_are_refused(tmp_path: Path, find: Callable[[Path], None]) -> None:
    text = r"Finder would train by itself, .* on public data, with Lightning's Trainer"
    with pytest.raises(ValueError, match=text):
        find(tmp_path)


def test_callbacks_without_the_private_one_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    private = run.callbacks
    run.callbacks = [Timer()]
    with pytest.raises(ValueError, match=r"trainer\.callbacks lacks .* append them to trainer\.c"):
        run.fit(Net(), data(8, batch_size=8))
    run.callbacks = private
    run.callbacks.append(Timer())  # the remedy
    run.fit(Net(), data(8, batch_size=8))
    assert run.engine.accountant.history == [(1.0, 1.0, 1)]


class Trains(L.Callback):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.run()


class Removes(L.Callback):
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.callbacks = []


class Replaces(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers = [trainer.optimizers[0].original_optimizer]


class OwnFinder(Net):
    def configure_callbacks(self) -> Any:
        return LearningRateFinder(num_training_steps=4)


@pytest.mark.parametrize(
    ("callback", "net"),
    [(Trains, Net), (Removes, Net), (Replaces, Net), (L.Callback, OwnFinder)],
)
def test_no_step_of_a_fit_is_plain(
    tmp_path: Path, callback: type[L.Callback], net: type[Net]
) -> None:
    run, module = trainer(tmp_path), net()
    run.callbacks.insert(0, callback())
    before = flat(module)
    with pytest.raises(PrivacyViolationError, match=r"no noise, .* trains by itself, .* Leave it"):
        run.fit(module, data(32, batch_size=8))
    assert torch.equal(flat(module), before)
    assert "training_step" not in vars(module)


class Repeated(Net):
    """Runs its closure twice, as a sharpness-aware step does."""

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        closure()
        optimizer.step(closure=closure)


def test_the_parts_of_a_sample_run_once(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, max_physical_batch_size=2)
    with pytest.raises(PrivacyViolationError, match=r"second time for one sample.* would count tw"):
        run.fit(Repeated(), data(4, batch_size=4))
    assert run.engine.accountant.history == []
    run = trainer(tmp_path, max_steps=1)  # the remedy
    run.fit(Repeated(), data(4, batch_size=4))
    assert run.engine.accountant.history == [(1.0, 1.0, 1)]


class Twice(Net):
    """Takes two steps on one batch: the second is of noise alone."""

    use_pl_optimizer = True

    def training_step(self, batch: Any, index: int) -> None:
        super().training_step(batch, index)
        optimizer = self.optimizers(use_pl_optimizer=self.use_pl_optimizer)
        optimizer.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("wrapped", [True, False])
def test_no_step_of_a_batch_exceeds_the_target(tmp_path: Path, wrapped: bool) -> None:
    run, net = trainer(tmp_path, privacy={"target_epsilon": 2.0}), Twice(manual=True)
    net.use_pl_optimizer = wrapped
    with pytest.raises(ValueError, match="one more step would exceed target_epsilon=2"):
        run.fit(net, data(32, batch_size=8))
    ((noise, rate, steps),) = run.engine.accountant.history
    assert steps % 2 == 1  # between the two steps of a batch
    assert run.epsilon <= 2.0 < run._spending._epsilon_of([(noise, rate, steps + 1)])


class Silent(Net):
    """Has no loss for some of its parts."""

    without: tuple[int, ...] = ()

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        loss = super().training_step(batch, index)
        return None if len(self.seen) - 1 in self.without else loss


@pytest.mark.parametrize(("without", "left"), [((1,), (0, 1, 4, 5)), ((0, 2), (2, 3))])
def test_a_part_without_a_loss_contributes_nothing(
    tmp_path: Path, without: tuple[int, ...], left: tuple[int, ...]
) -> None:
    def moved(net: Net, items: Any) -> Tensor:
        before = flat(net)
        run = trainer(
            tmp_path,
            privacy={"noise_multiplier": 0.0},
            max_steps=1,
            max_physical_batch_size=2,
        )
        run.fit(net, DataLoader(items, batch_size=len(items)))
        assert run.engine.accountant.history == [(0.0, 1.0, 1)]
        return (before - flat(net)) * len(items)

    items, net = data(6, batch_size=6).dataset, Silent(lr=1.0)
    net.without = without
    expected = moved(Net(lr=1.0), Subset(items, left))
    torch.testing.assert_close(moved(net, items), expected, rtol=0, atol=1e-5)
    assert net.seen == [2, 2, 2]


class Draws(Net):
    def training_step(self, dataloader_iter: Any) -> Tensor | None:
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


def test_a_step_that_draws_its_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Draws\.training_step.* training_step\(batch, batch_idx"):
        trainer(tmp_path).fit(Draws(), data(8, batch_size=8))


class OfBatch(Net):
    def training_step(self, batch: Any) -> Tensor | None:
        return super().training_step(batch, 0)


@pytest.mark.parametrize("rows", [None, 2])
def test_a_step_needs_no_index(tmp_path: Path, rows: int | None) -> None:
    run = trainer(tmp_path, max_steps=1, max_physical_batch_size=rows)
    run.fit(OfBatch(), data(8, batch_size=8))
    assert run.engine.accountant.history == [(1.0, 1.0, 1)]


def test_a_fit_without_steps_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_train_batches=0)
    with pytest.raises(ValueError, match=r"limit_train_batches=0 leaves .* trainer\.validate"):
        run.fit(Net(), data(8, batch_size=8))
