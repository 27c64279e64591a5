"""What users do around a forward and a backward pass, with one factor for all layers."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from tests.checks import Trainer, check_independence, check_sensitivity
from tests.helpers import make_private, mlp, train_step, values
from tests.joint.helpers import (
    ATTAINED,
    check_flat,
    clipped_flat,
    joint,
    own_gradients,
    released,
    summed,
)
from tests.readers import FEATURES, STEPS, Reader


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _target(rows: int, outputs: int) -> Tensor:
    return _double(rows, outputs) * torch.logspace(-2, 2, rows, dtype=torch.float64)[:, None]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Heads(nn.Module):
    """Two layers on the same input, each with an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


def _heads() -> tuple[Trainer, Tensor, Tensor]:
    trainer = Trainer(Heads(), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    return trainer, x, trainer.model


def _at_most_delta(trainer: Trainer) -> None:
    """Step, or be refused; what is released is within the sensitivity."""
    try:
        trainer.optimizer.step()
    except PrivacyViolationError:
        return
    assert summed(trainer.plain).norm() <= trainer.optimizer.max_grad_norm


@pytest.mark.parametrize("retain", [False, True])
def test_two_backward_passes_through_parts_of_one_forward_pass_spend_delta_once(retain):
    trainer, x, model = _heads()
    left, right = model(x)
    (1e3 * left.sum()).backward(retain_graph=retain)
    try:
        (1e3 * right.sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


def test_two_backward_passes_spend_delta_once_also_where_batches_may_add_up():
    trainer, x, model = _heads()
    trainer.optimizer._hooks.allow_grad_accumulation()
    left, right = model(x)
    (1e3 * left.sum()).backward()
    try:
        (1e3 * right.sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


class Greedy(nn.Module):
    """Trains each block on a loss of its own, inside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            y = block(x)
            (1e3 * y.sum()).backward()
            x = y.detach()
        return self.blocks[-1](x)


def test_local_losses_inside_the_forward_pass_spend_delta_once():
    trainer = Trainer(Greedy(), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    try:
        (1e3 * trainer.model(torch.ones(1, 3, dtype=torch.float64)).sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


class Energy(nn.Module):
    """Moves its input along a gradient of its own layer, then uses the layer again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((self.layer(z) * 1e-6).sum(), z)
        return self.layer(x + g.detach())


def test_a_gradient_taken_inside_the_forward_pass_does_not_hide_a_use():
    trainer = Trainer(Energy(), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    try:
        (1e5 * trainer.model(torch.ones(1, 3, dtype=torch.float64)).sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


def test_a_look_at_an_inputs_gradient_releases_nothing():
    trainer, x, model = _heads()
    left, right = model(x)
    torch.autograd.grad(left.sum(), x, retain_graph=True)
    try:
        right.sum().backward()
        trainer.optimizer.step()
    except PrivacyViolationError:
        return
    assert not trainer.plain.left.weight.summed_grad.any()


def test_a_backward_pass_that_broke_off_leaves_nothing_to_the_next():
    trainer, x, model = _heads()
    left, right = model(x)

    def breaks(gradient: Tensor) -> None:
        raise KeyError("stop")

    x.register_hook(breaks)
    with pytest.raises(KeyError):
        left.sum().backward()
    with contextlib.suppress(KeyError, PrivacyViolationError):
        right.sum().backward()
    try:
        trainer.optimizer.step()
    except PrivacyViolationError:
        return
    assert not trainer.plain.left.weight.summed_grad.any()


class Teaching(nn.Module):
    """Calls the whole model again, without gradients, in the middle of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor, teacher: bool = False) -> Tensor:
        y = self.first(x)
        if not teacher:
            with torch.no_grad():
                y = y + self(x, teacher=True)
        return self.third(self.second(y))


def test_a_call_of_the_model_inside_itself_does_not_split_the_budget():
    trainer = Trainer(Teaching(), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    x = torch.ones(1, 3, dtype=torch.float64)
    try:
        (1e5 * trainer.model(x).sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


class _Steeper(torch.autograd.Function):
    """Makes a gradient larger, in the memory that it came in."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g.mul_(1e6)


class Residual(nn.Module):
    """Both branches get one tensor as their gradient, and one of them may change it in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.small = nn.Linear(3, 3, bias=False)
        self.branch = {
            "linear": lambda: nn.Linear(3, 3),
            "norm": lambda: nn.LayerNorm(3),
            "layer": lambda: nn.Bilinear(3, 3, 3),
        }[how.partition(", ")[2]]()

    def forward(self, x: Tensor) -> Tensor:
        # Its own gradient is negligible, so the bound does not see what becomes of it.
        y = self.small(1e-12 * x)
        if self.how.startswith("hook"):
            y.register_hook(lambda g: g.mul_(1e6).sum() and None)
        else:
            y = _Steeper.apply(y)
        return y + (self.branch(x, x) if "layer" in self.how else self.branch(x))


@pytest.mark.parametrize("kind", ["linear", "norm", "layer"])
@pytest.mark.parametrize("how", ["hook", "function"])
def test_a_gradient_changed_in_place_after_it_was_measured_is_bounded_or_refused(how, kind):
    trainer = Trainer(Residual(f"{how}, {kind}"), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    try:
        (trainer.model(x) * x).sum().backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


def test_the_same_forward_pass_backward_twice_is_refused():
    trainer = Trainer(mlp(), (4,), joint())
    loss = trainer.model(_double(2, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyViolationError, match="ran twice for one forward pass"):
        loss.backward()


def test_two_forward_passes_before_one_backward_pass_are_refused():
    trainer = Trainer(mlp(), (4,), joint())
    one, other = trainer.model(_double(2, 4)), trainer.model(_double(2, 4))
    with pytest.raises(PrivacyViolationError, match="two forward passes of the model"):
        (one.sum() + other.sum()).backward()


def test_a_forward_pass_that_is_never_used_changes_nothing():
    torch.manual_seed(1)
    trainer = Trainer(mlp(), (4,), joint())
    x, target = _double(3, 4), _target(3, 3)
    expected = released(trainer, x, target).clone()
    trainer.optimizer.zero_grad()
    output = trainer.model(x)
    trainer.model(2 * x)
    with torch.no_grad():
        trainer.model(3 * x)
    trainer.loss(output, target, "mean").backward()
    trainer.optimizer.step()
    assert torch.equal(summed(trainer.plain), expected)


def test_a_forward_pass_that_fails_does_not_reach_into_the_next():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.fails = nn.Linear(3, 3), nn.Linear(3, 2), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            if self.fails:
                raise KeyError("stop")
            return self.other(y)

    trainer = Trainer(Failing(), (3,), joint())
    x, target = _double(3, 3), _target(3, 2)
    expected = released(trainer, x, target).clone()
    trainer.plain.fails = True
    with pytest.raises(KeyError):
        trainer.model(x)
    trainer.plain.fails = False
    assert torch.equal(released(trainer, x, target), expected)


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
    x, target = _double(4, 4), _target(4, 4)
    check_flat(lambda: copy.deepcopy(model), x, target)


@pytest.mark.parametrize("frozen", ["0", "2", "0.bias", "2.weight", "2.bias"])
def test_a_frozen_part_takes_no_part_of_the_budget(frozen):
    model = mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x, target = _double(4, 4), _target(4, 3)
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
    x, target = _double(4, 4), _target(4, 2)
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
    ids, numbers, target = torch.randint(5, (4, 6)), _double(4, 2), _target(4, 2)
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
    x, target = _double(5, 4), _target(5, 2)
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
        trainer.step(_double(count, 4), _target(count, 2))
        runs.append(trainer.plain.runs)
    assert runs[0] == runs[1], f"three blocks ran {runs[0]} times, and then {runs[1]}"


def test_the_whole_model_checkpointed_keeps_its_factor():
    reader = Reader()
    x, target = _double(4, STEPS, FEATURES), _target(4, 2)
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
    assert not released(trainer, _double(0, 4), _double(0, 2)).any()


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_private_model_clips_with_a_factor_of_its_own(how):
    trainer = Trainer(mlp(), (4,), joint(), max_grad_norm=0.5, reduction="sum")
    x, target = _double(4, 4), _target(4, 3)
    expected = released(trainer, x, target).clone()
    trainer.optimizer.zero_grad()
    output = trainer.model(x)  # in the middle of training
    if how == "deepcopy":
        twin = copy.deepcopy(trainer.model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(trainer.model))
    else:
        buffer = io.BytesIO()
        torch.save(trainer.model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin._budget is not trainer.model._budget
    assert twin._budget.key != trainer.model._budget.key
    trainer.optimizer.max_grad_norm = 7.0
    assert twin._max_grad_norm == 0.5
    assert float(twin._budget.target.limit) == 0.5
    twin._guard.clear()
    twin.zero_grad()
    trainer.loss(twin(x), target, "sum").backward()
    sums = [twin._guard.take(p) for p in twin._module.parameters()]
    assert (torch.cat([s.flatten() for s in sums]) - expected).norm() < 1e-12
    # The original goes on from where it was.
    trainer.loss(output, target, "sum").backward()
    assert trainer.optimizer._guard.collected == 1


# Settings between steps


def test_delta_can_be_set_between_steps():
    trainer = Trainer(mlp(), (4,), joint(normalize=True), reduction="sum")
    x, target = _double(1, 4), 1e6 * _double(1, 3)
    for limit in (0.3, 20.0, 1e-5):
        trainer.optimizer.max_grad_norm = limit
        assert ATTAINED * limit <= released(trainer, x, target).norm() <= limit


def test_delta_cannot_be_set_between_backward_and_step():
    trainer = Trainer(mlp(), (4,), joint())
    trainer.model(_double(2, 4)).sum().backward()
    with pytest.raises(PrivacyViolationError, match="in the middle of a logical batch"):
        trainer.optimizer.max_grad_norm = 2.0


def test_delta_set_between_forward_and_backward_is_the_one_that_counts():
    trainer = Trainer(mlp(), (4,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    output = trainer.model(_double(1, 4))
    trainer.optimizer.max_grad_norm = 0.01
    (1e6 * output.sum()).backward()
    trainer.optimizer.step()
    assert summed(trainer.plain).norm() <= 0.01


@pytest.mark.parametrize("clear", ["optimizer", "to zero", "model", "by hand", "not at all"])
def test_gradients_cleared_in_any_way_are_cleared(clear):
    private = make_private(mlp(), backprop=joint(), lr=0.0)
    train_step(private)
    expected = torch.cat([p.summed_grad.flatten() for p in private.parameters]).clone()
    if clear == "optimizer":
        private.optimizer.zero_grad()
    elif clear == "to zero":
        private.optimizer.zero_grad(set_to_none=False)
    elif clear == "model":
        private.model.zero_grad()
    elif clear == "by hand":
        for p in private.parameters:
            p.grad = None
    before = values(private).clone()
    try:
        train_step(private)
    except ValueError:
        assert clear == "not at all"
        return
    sums = torch.cat([p.summed_grad.flatten() for p in private.parameters])
    assert torch.equal(sums, expected)
    assert torch.equal(values(private), before)


# Precisions, hooks


class Mixed(nn.Module):
    """Layers of two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.double_ = nn.Linear(4, 4), nn.Linear(4, 4).double()
        self.norm, self.head = nn.LayerNorm(4).double(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.single(x)).double()
        return self.head(self.norm(self.double_(y)).float())


def test_layers_of_two_precisions_share_one_factor():
    model = Mixed()
    x, target = torch.randn(4, 4), torch.randn(4, 2) * torch.tensor([0.01, 1.0, 1e2, 1e5])[:, None]
    own = [g.double() for g in own_gradients(model, x, target)]
    private = make_private(copy.deepcopy(model), backprop=joint(), loss_reduction="sum", lr=0.0)
    private.optimizer.zero_grad()
    (private.model(x) * target).sum().backward()
    private.optimizer.step()
    sums = [p.summed_grad for p in private.parameters]
    assert [s.dtype for s in sums] == [p.dtype for p in private.parameters]
    total = torch.cat([s.double().flatten() for s in sums])
    assert (total - clipped_flat(own, 1.0)).norm() < 1e-4


def test_hooks_of_the_users_see_the_gradients_as_they_are():
    model = mlp(dtype=torch.float64)
    x, target = _double(3, 4), _target(3, 3)
    seen: list[Tensor] = []
    plain = copy.deepcopy(model)
    plain[0].register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
    (plain(x.clone().requires_grad_()) * target).sum().backward()
    trainer = Trainer(copy.deepcopy(model), (4,), joint(), reduction="sum")
    trainer.plain[0].register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
    trainer.plain[2].register_forward_hook(lambda m, i, o: o + 0)
    trainer.step(x.clone().requires_grad_(), target)
    assert torch.allclose(seen[0], seen[1])
    expected = clipped_flat(own_gradients(model, x, target), 1.0)
    assert (summed(trainer.plain) - expected).norm() < 1e-8


def test_a_hook_that_scales_a_hidden_gradient_is_part_of_the_model():
    # As gradient clipping between layers is: it comes before the layers below are measured.
    trainer = Trainer(mlp(), (4,), joint(), reduction="sum")
    trainer.plain[2].register_full_backward_pre_hook(lambda m, g: (1e8 * g[0],))
    trainer.plain[0].register_full_backward_pre_hook(lambda m, g: (1e8 * g[0],))
    x, target = _double(3, 4), _target(3, 3)
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)


# Torch's, on Opacus's hooks on a first layer.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_training_without_noise_is_training_with_flat_clipping():
    def trained(**options: object) -> Tensor:
        private = make_private(mlp(), lr=0.5, max_grad_norm=0.3, **options)
        for size in (6, 3, 8):
            train_step(private, size)
        return values(private)

    ours = trained(backprop=BackpropClipping())
    assert (ours - trained(clipping="flat")).norm() < 1e-5
