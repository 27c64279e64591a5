"""Lightning's trainer takes batches, modules and checkpoints as Lightning's own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import AdaptiveThreshold, BackpropClipping, clip_inputs
from tests.integrations.plain import flat
from tests.integrations.tiny_lightning import Net, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_each_part_has_the_precision_of_the_model(tmp_path: Path, precision: str) -> None:
    run = trainer(
        tmp_path, precision=precision, criterion="criterion", max_physical_batch_size=2, max_steps=1
    )
    net = Net()
    run.fit(net, data(6, batch_size=6))
    assert net.seen == [2, 2, 2]
    assert run.engine.accountant.history == [(1.0, 1.0, 1)]


class Scaled(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return data(6, batch_size=6)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return torch.full_like(batch[0], 7.0), batch[1]


class Noted(Net):
    def training_step(self, batch: Any, index: int) -> Tensor | None:
        self.first = [*getattr(self, "first", []), float(batch[0][0, 0])]
        return super().training_step(batch, index)


def test_each_part_goes_through_the_data_module(tmp_path: Path) -> None:
    net = Noted()
    run = trainer(tmp_path, max_physical_batch_size=2, max_steps=1)
    run.fit(net, datamodule=Scaled())
    assert net.first == [7.0] * 3


class OnFrozen(Net):
    """Has a frozen part in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        self.modes = [self.model.training, *(module.training for module in self.frozen)]
        return self.model(self.frozen(x))


def test_a_frozen_part_stays_in_evaluation_mode(tmp_path: Path) -> None:
    net = OnFrozen()
    trainer(tmp_path, max_steps=1).fit(net, data(8, batch_size=8))
    assert net.modes == [True, False, False]
    assert not net.frozen[0].num_batches_tracked


CLIPPED = {"backprop": BackpropClipping(probe=False, max_input_norm=1.0)}


class Clipped(Net):
    """Clips its inputs itself, as the documentation says."""

    def __init__(self) -> None:
        super().__init__()
        clip_inputs(self.model, 1.0)


@pytest.mark.parametrize("net", [Net, Clipped])
def test_a_run_with_clipped_inputs_goes_on(tmp_path: Path, net: type[Net]) -> None:
    run = trainer(tmp_path, privacy=CLIPPED, max_epochs=1)
    run.fit(Net(), data(32, batch_size=8))
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed, module = trainer(tmp_path, privacy=CLIPPED), net()
    resumed.fit(module, data(32, batch_size=8), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.engine.accountant.history == [(1.0, 0.25, 8)]
    x = torch.full((1, 4), 100.0)
    assert torch.equal(module(x), module(2 * x))  # still clipped


def test_a_module_that_clips_its_inputs_is_loaded(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, privacy=CLIPPED, max_epochs=1), Clipped()
    run.fit(module, data(32, batch_size=8))
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="max_input_norm"):
        Net.load_from_checkpoint(tmp_path / "a.ckpt")
    loaded, x = Clipped.load_from_checkpoint(tmp_path / "a.ckpt"), torch.ones(1, 4)
    assert torch.equal(loaded(x), module(x))


class Late(Net):
    """Makes its model when Lightning asks for it."""

    def __init__(self) -> None:
        super().__init__()
        del self.model

    def configure_model(self) -> None:
        self.model = nn.Linear(4, 3)


def test_a_model_may_be_made_late(tmp_path: Path) -> None:
    run = trainer(tmp_path, privacy=CLIPPED, max_epochs=1)
    run.fit(Late(), data(8, batch_size=8))
    assert run.engine.accountant.history == [(1.0, 1.0, 1)]


class Evaluated(Net):
    def test_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.criterion(self(batch[0]), batch[1]))


def test_the_test_of_a_checkpoint_spends_nothing(tmp_path: Path) -> None:
    other = trainer(tmp_path, privacy={"backprop": None}, max_epochs=1)
    other.fit(Evaluated(), data(32, batch_size=8))
    other.save_checkpoint(tmp_path / "other.ckpt")
    run, net = trainer(tmp_path, max_epochs=1), Evaluated()
    run.fit(net, data(32, batch_size=8))
    before = flat(net)
    run.test(net, data(8, batch_size=8), ckpt_path=tmp_path / "other.ckpt", verbose=False)
    assert run.engine.accountant.history == [(1.0, 0.25, 4)]
    assert not torch.equal(flat(net), before)  # the other run's weights


ADAPTIVE = {"backprop": BackpropClipping(probe=False, threshold=AdaptiveThreshold(initial=0.3))}


def test_thresholds_are_saved_after_the_fit_too(tmp_path: Path) -> None:
    first: list[dict[str, float]] = []

    class Noted(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            first.append(dict(trainer.optimizers[0].thresholds))

    def run(epochs: int, **options: Any) -> Any:
        return trainer(
            tmp_path,
            privacy=ADAPTIVE,
            criterion="criterion",
            max_epochs=epochs,
            callbacks=[Noted()],
            **options,
        )

    ended = run(1)
    ended.fit(Net(), data(32, batch_size=8))
    ended.save_checkpoint(tmp_path / "ended.ckpt")
    state = torch.load(tmp_path / "ended.ckpt", weights_only=False)["optimizer_states"][0]
    run(2).fit(Net(), data(32, batch_size=8), ckpt_path=tmp_path / "ended.ckpt")
    assert first[0] == {"(model)": 0.3} != first[1] == state["thresholds"]["thresholds"]
    assert state["privacy_settings"]["noise_multiplier"] == 1.0
    ended.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    ended.fit_loop.max_epochs = 2
    ended.fit(Net(), data(32, batch_size=8))
    assert first[2] == {"(model)": 0.3}
