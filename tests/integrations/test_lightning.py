"""Lightning's trainer trains privately: its claim, steps, checkpoints and refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from opacus.lightning import DPLightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import SeveralOptimizers
from opacus_bpclip.errors import PrivacyViolationError
from tests.integrations.plain import check_moved, flat
from tests.integrations.tiny_lightning import Net, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def summed(folder: Path, count: int, *, clip: float = 1e-2, **options: Any) -> Tensor:
    """Return the sum that one step on all examples releases, without noise."""
    net = Net(lr=1.0, manual=options.pop("manual", False))
    before = flat(net)
    run = trainer(
        folder, privacy={"noise_multiplier": 0.0}, max_grad_norm=clip, max_steps=1, **options
    )
    run.fit(net, data(count, batch_size=count))  # each is sampled for certain
    assert run.engine.accountant.history == [(0.0, 1.0, 1)]
    assert run.global_step == 1
    return (before - flat(net)) * count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"manual": True},
        {"max_physical_batch_size": 2},
        {"criterion": "criterion", "precision": "bf16-mixed"},
        {"criterion": "criterion", "precision": "bf16-mixed", "max_physical_batch_size": 2},
    ],
    ids=["automatic", "manual", "parts", "bfloat16", "bfloat16 in parts"],
)
def test_one_example_moves_a_step_by_no_more_than_the_claim(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    check_moved(summed(tmp_path, 6, **options) - summed(tmp_path, 5, **options), 1e-2)


def test_physical_batches_add_up_to_their_logical_batch(tmp_path: Path) -> None:
    whole = summed(tmp_path, 6, clip=1.0)
    parts = summed(tmp_path, 6, clip=1.0, max_physical_batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_each_logical_batch_is_a_step(tmp_path: Path) -> None:
    net = Net()
    run = trainer(tmp_path, max_physical_batch_size=2)
    run.fit(net, data(32, batch_size=8))
    assert run.global_step == 8
    assert run.engine.accountant.history == [(1.0, 0.25, 8)]
    assert max(net.seen) == 2
    assert float(run.callback_metrics["epsilon"]) == pytest.approx(run.epsilon)


def test_a_run_spends_its_target_in_the_steps_that_are_planned(tmp_path: Path) -> None:
    run = trainer(tmp_path, privacy={"noise_multiplier": None, "target_epsilon": 6.0})
    run.fit(Net(), data(32, batch_size=8))
    assert run.global_step == 8
    assert 5.98 < run.epsilon <= 6.0


def test_training_stops_before_the_step_that_would_exceed_the_target(tmp_path: Path) -> None:
    run, net = trainer(tmp_path, privacy={"target_epsilon": 3.0}), Net()
    run.fit(net, data(32, batch_size=8))
    ((noise, rate, steps),) = run.engine.accountant.history
    assert run.epsilon <= 3.0
    assert 0 < steps == run.global_step < 8
    assert run._spending._epsilon_of([(noise, rate, steps + 1)]) > 3.0
    with pytest.raises(ValueError, match=r"one more step would exceed target_epsilon=3\.0\. Pass"):
        run.fit(net, data(32, batch_size=8))
    assert run._spending.steps == steps


def test_lightning_cannot_go_on_after_the_last_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, privacy={"target_epsilon": 3.0}, min_epochs=2)
    with pytest.raises(ValueError, match="one more step would exceed"):
        run.fit(Net(), data(32, batch_size=8))
    assert run.epsilon <= 3.0


def test_a_checkpoint_keeps_what_was_spent(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Net(), data(32, batch_size=8))
    run.save_checkpoint(tmp_path / "later.ckpt")
    (tmp_path / "privacy").rename(tmp_path / "away")  # the history is in the checkpoint itself
    resumed = trainer(tmp_path, max_epochs=3)
    resumed.fit(Net(), data(32, batch_size=8), ckpt_path=tmp_path / "later.ckpt")
    assert resumed.global_step == 12
    assert resumed.engine.accountant.history == [(1.0, 0.25, 12)]
    assert resumed.epsilon > run.epsilon


def test_a_branch_counts_the_steps_of_the_branches_beside_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Net(), data(32, batch_size=8))
    run.save_checkpoint(tmp_path / "four.ckpt")
    for _ in range(2):
        branch = trainer(tmp_path)
        branch.fit(Net(), data(32, batch_size=8), ckpt_path=tmp_path / "four.ckpt")
        branch.save_checkpoint(tmp_path / "eight.ckpt")
    # Four steps were taken, and twice four again from there on.
    assert branch.engine.accountant.history == [(1.0, 0.25, 12)]


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path: Path) -> None:
    stock = L.Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    stock.fit(Net(), data(8, batch_size=8))
    stock.save_checkpoint(tmp_path / "stock.ckpt")
    with pytest.raises(ValueError, match=r"stock\.ckpt does not say what .* fit without ckpt_path"):
        trainer(tmp_path).fit(Net(), data(8, batch_size=8), ckpt_path=tmp_path / "stock.ckpt")


def test_the_module_is_as_it_was_after_a_fit(tmp_path: Path) -> None:
    net = Net()
    state, criterion = set(net.state_dict()), net.criterion
    run = trainer(tmp_path, max_steps=1, criterion="criterion", max_physical_batch_size=8)
    run.fit(net, data(8, batch_size=8))
    assert set(net.state_dict()) == state
    assert net.criterion is criterion
    assert "training_step" not in vars(net)
    L.Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path).fit(
        net, data(8, batch_size=8)
    )


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return data(32, batch_size=8)


def test_opacus_data_module_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Net(), datamodule=DPLightningDataModule(Data()))
    assert run.engine.accountant.history == [(1.0, 0.25, 4)]


class InParts(Net):
    """Splits its batches itself, as the refusal says."""

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        parts = list(zip(*(tensor.split(2) for tensor in batch), strict=True))
        for number, (x, y) in enumerate(parts, 1):
            optimizer.zero_grad()
            optimizer.signal_skip_step(number < len(parts))
            self.manual_backward(self.criterion(self(x), y))
            optimizer.step()


def test_manual_optimization_splits_its_batches_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_physical_batch_size needs automatic optimi"):
        trainer(tmp_path, max_physical_batch_size=2).fit(Net(manual=True), data(8, batch_size=8))
    net = InParts(manual=True, lr=1.0)
    before = flat(net)
    run = trainer(tmp_path, privacy={"noise_multiplier": 0.0}, max_grad_norm=1.0, max_epochs=1)
    run.fit(net, data(6, batch_size=6))
    assert run.engine.accountant.history == [(0.0, 1.0, 1)]
    whole = summed(tmp_path, 6, clip=1.0)
    torch.testing.assert_close((before - flat(net)) * 6, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"precision": "16-mixed"}, 'Train with precision="bf16-mixed", or in float32.'),
        ({"gradient_clip_val": 1.0}, "pass max_grad_norm instead."),
        ({"accumulate_grad_batches": 2}, "and pass max_physical_batch_size, the largest number"),
        ({"reload_dataloaders_every_n_epochs": 1}, "Leave it out: each epoch draws new samples."),
        ({"strategy": "ddp_spawn", "devices": 2}, 'Pass strategy="ddp" for a copy of the model'),
    ],
)
def test_options_that_do_not_go_with_privacy_are_refused(
    tmp_path: Path, option: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        trainer(tmp_path, **option)


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Pass max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(Net(), data(8, batch_size=8))


def test_several_loaders_are_refused(tmp_path: Path) -> None:
    loaders = [data(8, batch_size=8), data(8, batch_size=8)]
    with pytest.raises(ValueError, match=r"Expected one training data loader, not list: .* Pass"):
        trainer(tmp_path, max_epochs=1).fit(Net(), loaders)


class TwoOptimizers(Net):
    together = False

    def configure_optimizers(self) -> Any:
        one, other = (torch.optim.SGD(self.model[i].parameters(), lr=0.1) for i in (0, 2))
        return SeveralOptimizers(one, other) if self.together else [one, other]


def test_several_optimizers_are_one(tmp_path: Path) -> None:
    net = TwoOptimizers(manual=True)
    with pytest.raises(ValueError, match=r"Return one: opacus_bpclip\.SeveralOptimizers"):
        trainer(tmp_path, max_epochs=1).fit(net, data(8, batch_size=8))
    net.together = True
    run = trainer(tmp_path, max_epochs=1)
    run.fit(net, data(8, batch_size=8))
    assert run.engine.accountant.history == [(1.0, 1.0, 1)]


class Bare(Net):
    """Has no forward of its own."""

    forward = L.LightningModule.forward

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.criterion(self.model(batch[0]), batch[1])


def test_the_only_module_is_the_model_where_there_is_no_forward(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Bare(), data(8, batch_size=8))
    assert run.engine.accountant.history == [(1.0, 1.0, 1)]
    net = Bare()
    net.other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Define Bare\.forward, .* call self\(\.\.\.\) in train"):
        trainer(tmp_path, max_epochs=1).fit(net, data(8, batch_size=8))


class Around(Net):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.criterion(self.model(batch[0]), batch[1])


def test_a_step_around_forward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyViolationError, match="was called outside its model's forward pass"):
        trainer(tmp_path, max_epochs=1).fit(Around(), data(8, batch_size=8))
