"""Frozen parts, several inputs, checkpoints and physical batches share one factor all the same."""

import copy

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.checks import Trainer, check_independence, check_sensitivity
from tests.helpers import make_private, mlp
from tests.joint.helpers import (
    check_flat,
    clipped_flat,
    joint,
    own_gradients,
    released,
    summed,
)
from tests.joint.parts import doubles, target_for
from tests.readers import FEATURES, STEPS, Reader

# Frozen parts


class Adapted(nn.Module):
    """A frozen layer with a trainable adapter beside it, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            nn.Linear(4, 4),
            nn.Linear(4, 2, bias=False),
            nn.Linear(2, 4),
        )
        self.norm = nn.LayerNorm(4)
        for module in (self.base, self.norm):
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(self.base(x) + self.up(self.down(x)))
        return x


def test_adapters_of_frozen_layers_share_one_factor():
    model = Adapted()
    x, target = doubles(4, 4), target_for(4, 4)
    check_flat(lambda: copy.deepcopy(model), x, target)


@pytest.mark.parametrize("frozen", ["0", "2", "0.bias", "2.weight", "2.bias"])
def test_a_frozen_part_takes_no_part_of_the_budget(frozen):
    model = mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x, target = doubles(4, 4), target_for(4, 3)
    check_flat(lambda: copy.deepcopy(model), x, target)


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.head(y if self.skips else y + self.middle(y))


def test_a_layer_that_is_skipped_leaves_the_budget_to_the_others():
    model = Skipping().double()
    x, target = doubles(4, 4), target_for(4, 2)
    trainer = Trainer(copy.deepcopy(model), (4,), joint())
    for skips in (False, True, False):
        model.skips = trainer.plain.skips = skips
        expected = clipped_flat(own_gradients(model, x, target), 1.0)
        assert (released(trainer, x, target) - expected).norm() < 1e-8


class Several(nn.Module):
    """Inputs of several kinds, one of which some layers never see."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers, self.head = nn.Embedding(5, 3), nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor, *, numbers: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"y": self.head(torch.tanh(self.words(ids).mean(1) + scale * self.numbers(numbers)))}


def test_several_inputs_and_outputs_share_one_factor():
    model = Several().double()
    trainer = Trainer(copy.deepcopy(model), (2,), joint(), reduction="sum")
    ids, numbers, target = torch.randint(5, (4, 6)), doubles(4, 2), target_for(4, 2)
    own = []
    for i in range(4):
        rows = slice(i, i + 1)
        loss = (model(ids[rows], numbers=numbers[rows], scale=2.0)["y"] * target[rows]).sum()
        own.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())]))
    trainer.optimizer.zero_grad()
    (trainer.model(ids, numbers=numbers, scale=2.0)["y"] * target).sum().backward()
    trainer.optimizer.step()
    assert (summed(trainer.plain) - clipped_flat(own, 1.0)).norm() < 1e-8


# Activation checkpointing


class Checkpointed(nn.Module):
    """Blocks of layers of every path, some of them used twice."""

    def __init__(self, *, wraps: bool) -> None:
        super().__init__()
        self.wraps = wraps
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.LayerNorm(4))
        self.conv = nn.Sequential(
            nn.Unflatten(1, (1, 4)),
            nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(1, 2),
            nn.ConvTranspose1d(2, 1, 1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4, 2)
        self.runs = 0

    def run(self, part: nn.Module, x: Tensor) -> Tensor:
        def body(z: Tensor) -> Tensor:
            self.runs += 1
            return part(z)

        return checkpoint(body, x, use_reentrant=False) if self.wraps else body(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = torch.tanh(self.run(self.block, x))
        return self.head(x + self.run(self.conv, x))


@pytest.mark.parametrize("bound", ["product", "weighted", "exact"])
def test_checkpointing_changes_nothing(bound):
    x, target = doubles(5, 4), target_for(5, 2)
    sums = []
    for wraps in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(Checkpointed(wraps=wraps), (4,), joint(bound=bound), max_grad_norm=0.5)
        for _ in range(2):
            sums.append(released(trainer, x, target).clone())
        check_sensitivity(trainer, x, target)
        check_independence(trainer, x, target)
    for other in sums[1:]:
        assert (other - sums[0]).norm() < 1e-12


def test_checkpointing_runs_a_block_as_often_for_many_examples_as_for_two():
    trainer = Trainer(Checkpointed(wraps=True), (4,), joint())
    runs = []
    for count in (2, 6):
        trainer.plain.runs = 0
        trainer.step(doubles(count, 4), target_for(count, 2))
        runs.append(trainer.plain.runs)
    assert runs[0] == runs[1], f"three blocks ran {runs[0]} times, and then {runs[1]}"


def test_the_whole_model_checkpointed_keeps_its_factor():
    reader = Reader()
    x, target = doubles(4, STEPS, FEATURES), target_for(4, 2)
    one, other = copy.deepcopy(reader), reader
    other.wrap = True
    sums = [
        released(Trainer(model, (STEPS, FEATURES), joint()), x, target) for model in (one, other)
    ]
    assert (sums[0] - sums[1]).norm() < 1e-12


# Physical batches, empty ones


def test_physical_batches_add_up_to_the_whole_one():
    torch.manual_seed(1)
    private = make_private(mlp(), backprop=joint(), lr=0.0)
    x, y = torch.randn(7, 4), torch.randint(3, (7,))

    def step(rows: slice, last: bool) -> None:
        private.optimizer.zero_grad()
        private.optimizer.signal_skip_step(do_skip=not last)
        nn.functional.cross_entropy(10 * private.model(x[rows]), y[rows]).backward()
        private.optimizer.step()

    step(slice(0, 7), True)
    whole = torch.cat([p.summed_grad.flatten() for p in private.parameters])
    step(slice(0, 2), False)
    step(slice(2, 3), False)
    step(slice(3, 3), False)
    step(slice(3, 7), True)
    parts = torch.cat([p.summed_grad.flatten() for p in private.parameters])
    assert (whole - parts).norm() < 1e-5


def test_batch_memory_manager_gives_one_step_for_each_logical_batch():
    trainer = Trainer(mlp(), (4,), joint(), noise_multiplier=1.0)
    with BatchMemoryManager(
        data_loader=trainer.loader, max_physical_batch_size=1, optimizer=trainer.optimizer
    ) as loader:
        for (x,) in loader:
            trainer.step(x, torch.ones(len(x), 3, dtype=x.dtype))
    assert trainer.engine.accountant.history == [(1.0, 0.25, 4)]


@pytest.mark.parametrize("bound", ["product", "weighted", "exact"])
def test_an_empty_batch_is_a_sum_of_nothing(bound):
    trainer = Trainer(Checkpointed(wraps=False), (4,), joint(bound=bound))
    assert not released(trainer, doubles(0, 4), doubles(0, 2)).any()
