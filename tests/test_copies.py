"""A private model, its hooks, its optimizer and its loader may be copied and saved together."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import (
    CoverageError,
    PrivacyEngine,
    PrivacyViolationError,
    clip_inputs,
)
from tests.budgets import layerwise
from tests.helpers import CLASSES, FEATURES, dataset, flat


class Mixed(nn.Module):
    """A layer of each kind that is clipped in its own way, and tied layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = DPLSTM(1, 3, batch_first=True)
        self.norm = nn.LayerNorm(3)
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.frozen = nn.LayerNorm(3).requires_grad_(False)
        self.act, self.head = nn.PReLU(), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.lstm(x[..., None])[0][:, -1])
        return self.head(self.act(self.frozen(self.two(self.one(y)))))


class Setup(NamedTuple):
    model: Any
    handle: Any
    optimizer: Any
    loader: Any
    accountant: Any

    def train(self) -> None:
        for x, y in self.loader:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    @property
    def steps(self) -> int:
        return sum(steps for *_, steps in self.accountant.history)


def setup(
    *,
    wrap_model: bool = True,
    model: nn.Module | None = None,
    engine: PrivacyEngine | None = None,
    **options: Any,
) -> Setup:
    model = model or Mixed()
    engine = engine or PrivacyEngine()
    handle, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
        data_loader=DataLoader(dataset(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        wrap_model=wrap_model,
        **options,
    )
    return Setup(handle if wrap_model else model, handle, optimizer, loader, engine.accountant)


def saved(value: Any) -> Any:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved])


@COPIES
@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_copy_trains_and_so_does_the_original(
    make: Callable[[Any], Any], wrap_model: bool, trained: bool
) -> None:
    original = setup(wrap_model=wrap_model)
    if trained:
        original.train()
    before = flat(original.model.parameters())
    copied = Setup(*make(tuple(original)))
    assert torch.equal(flat(copied.model.parameters()), before)
    copied.train()
    assert torch.equal(flat(original.model.parameters()), before)
    after = flat(copied.model.parameters())
    assert not torch.equal(after, before)
    assert torch.equal(flat(copied.optimizer.params), flat(_trainable(copied.model)))
    original.train()
    assert torch.equal(flat(copied.model.parameters()), after)
    copied.handle.cleanup()
    original.handle.cleanup()


def test_what_is_frozen_in_a_copy_is_watched_once_it_trains_again() -> None:
    original = setup()
    original.model.one.requires_grad_(False)
    copied = copy.deepcopy(original.model)
    copied.one.requires_grad_(True)
    x, _ = dataset().tensors
    with pytest.raises(PrivacyViolationError, match="weight"):
        (copied(x).sum() + copied.one.weight.sum()).backward()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_what_a_deep_copy_spends_is_accounted_by_the_engine() -> None:
    original = setup()
    copied = Setup(*copy.deepcopy(tuple(original)[:4]), original.accountant)
    copied.train()
    original.train()
    assert original.steps == 2 * len(original.loader)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["engine first", "optimizer first"])
def test_a_deep_copy_with_its_engine_is_accounted_by_that(order: tuple[int, int]) -> None:
    engine = PrivacyEngine()
    original = setup(engine=engine)
    together = (engine, original)
    copied = copy.deepcopy([together[place] for place in order])
    copied[order.index(1)].train()
    counted = copied[order.index(0)].accountant.history
    assert sum(steps for *_, steps in counted) == len(original.loader)


@COPIES
def test_an_optimizer_that_was_saved_goes_on_with_the_history_that_was_saved(
    make: Callable[[Any], Any],
) -> None:
    original = setup()
    original.train()
    copied = Setup(*make(tuple(original)))
    copied.train()
    accountant = copied.optimizer.step_hook.accountant
    assert sum(steps for *_, steps in accountant.history) == 2 * len(original.loader)


def test_a_deep_copy_draws_no_noise_twice() -> None:
    # Not with the seed of torch's generator, which draws the samples.
    generator = torch.Generator().manual_seed(7)
    original = setup(noise_generator=generator)
    copied = copy.deepcopy(original.optimizer)
    assert copied.generator is original.optimizer.generator is generator


@COPIES
def test_a_copy_of_the_model_alone_evaluates_and_releases_nothing(
    make: Callable[[Any], Any],
) -> None:
    original = setup()
    original.train()
    alone = make(original.model)
    x, y = dataset().tensors
    with torch.no_grad():
        torch.testing.assert_close(alone(x), original.model(x))
    F.cross_entropy(alone(x), y).backward()
    assert all(p.grad is None for p in alone.parameters())


@COPIES
def test_a_copy_refuses_what_the_original_refuses(make: Callable[[Any], Any]) -> None:
    copied = Setup(*make(tuple(setup())))
    x, y = next((x, y) for x, y in copied.loader if len(x) > 1)
    model = copied.handle._module
    loss = F.cross_entropy(copied.model(x), y) + model.head.weight.square().sum()
    with pytest.raises(PrivacyViolationError, match=r"head\.weight got gradient from outside"):
        loss.backward()
    with pytest.raises(PrivacyViolationError):
        copied.optimizer.step()
    with pytest.raises(CoverageError, match="attached already"):
        setup(model=model)


def test_a_copy_in_the_middle_of_a_logical_batch_has_what_was_collected() -> None:
    original = setup()
    x, y = next((x, y) for x, y in original.loader if len(x) > 4)
    original.optimizer.signal_skip_step(True)
    F.cross_entropy(original.model(x[:2]), y[:2]).backward()
    original.optimizer.step()
    for made in (copy.deepcopy, pickled):
        copied = Setup(*made(tuple(original)))
        for p, own in zip(original.optimizer.params, copied.optimizer.params, strict=True):
            assert torch.equal(p.summed_grad, own.summed_grad)
            assert p.summed_grad is not own.summed_grad


class Uncopied:
    def __deepcopy__(self, memo: object) -> None:
        raise RuntimeError("not this")

    def __reduce_ex__(self, protocol: object) -> str:
        raise RuntimeError("not this")


@COPIES
def test_a_failed_copy_leaves_the_original_working(make: Callable[[Any], Any]) -> None:
    original = setup()
    original.train()
    original.model.note = Uncopied()
    with pytest.raises(RuntimeError, match="not this"):
        make(tuple(original))
    original.train()
    assert original.steps == 2 * len(original.loader)


def test_undoing_a_copy_puts_its_own_input_clips_back() -> None:
    model = clip_inputs(nn.Sequential(nn.Linear(FEATURES, CLASSES)), 1.0)
    original = setup(model=model, backprop=layerwise())
    copied = copy.deepcopy(original.handle)
    copied._undo()
    assert len(copied._module[0]._forward_pre_hooks) == 1
    assert len(model[0]._forward_pre_hooks) == 1  # the private model's own


def test_an_average_of_weights_may_be_kept() -> None:
    original = setup(backprop=layerwise(max_input_norm=None))
    averaged = torch.optim.swa_utils.AveragedModel(original.model)
    original.train()
    averaged.update_parameters(original.model)
    x, _ = dataset().tensors
    with torch.no_grad():
        torch.testing.assert_close(averaged(x), original.model(x))


def test_a_scheduler_that_wraps_step_is_not_copied() -> None:
    original = setup()
    torch.optim.lr_scheduler.LambdaLR(original.optimizer, lambda epoch: 0.5)
    copied = Setup(*copy.deepcopy(tuple(original)))
    before = flat(original.model.parameters())
    copied.train()
    assert torch.equal(flat(original.model.parameters()), before)
