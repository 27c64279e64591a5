"""Whitened gradients: plain autograd's, bounded, tight, and the same however they are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from opacus_bpclip import BackpropClipping, InputWhitening, PinkNoise
from opacus_bpclip.rules import precision
from opacus_bpclip.rules.whitened import WhitenedRule
from tests.checks import Trainer, check_independence, check_sensitivity, joint, linear_loss
from tests.helpers import make_private
from tests.neighbours import REDUCTIONS, neighbours
from tests.reference import whitened
from tests.strategies import clippings, whitenings
from tests.views.viewed import Viewed

ALLOCATIONS = pytest.mark.parametrize("allocation", ["joint", "equal"])


@st.composite
def whitened_clippings(draw: st.DrawFn) -> BackpropClipping:
    clipping = draw(clippings().filter(lambda clipping: clipping.bound == "exact"))
    return replace(clipping, whitening=draw(whitenings()))


@settings(max_examples=150)
@given(neighbours(clipping=whitened_clippings(), reduction=REDUCTIONS))
def test_one_example_moves_the_sum_by_at_most_its_sensitivity(
    case: tuple[Trainer, Tensor, Tensor],
) -> None:
    check_sensitivity(*case)


@settings(max_examples=80)
@given(neighbours(clipping=whitened_clippings(), reduction=REDUCTIONS, dtype=torch.float32))
def test_the_bound_holds_in_float32_at_every_scale(case: tuple[Trainer, Tensor, Tensor]) -> None:
    check_sensitivity(*case)


@settings(max_examples=80)
@given(neighbours(clipping=whitened_clippings(), reduction=REDUCTIONS))
def test_a_batch_sums_what_its_examples_contribute_alone(
    case: tuple[Trainer, Tensor, Tensor],
) -> None:
    check_independence(*case)


def network() -> nn.Sequential:
    """Layers of every kind that is whitened, and layers that are left as they are."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(2),
        nn.Linear(4, 5),
        nn.LayerNorm(5),
        nn.Flatten(),
        nn.Linear(15, 3),
    ).double()


SHAPE = (2, 7, 7)


def clipping_of(
    allocation: str = "joint", *, power: float = 0.5, every: int = 1
) -> BackpropClipping:
    whitening = InputWhitening(PinkNoise(SHAPE, count=9), power=power, every=every)
    return BackpropClipping(allocation=allocation, whitening=whitening)  # type: ignore[arg-type]


def batch(size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = {"dtype": torch.float64, "generator": generator}
    return torch.randn(size, *SHAPE, **make), torch.randn(size, 3, **make)  # type: ignore[call-overload]


def matrices_of(trainer: Trainer) -> dict[str, Tensor]:
    layers = trainer.optimizer._hooks._whitening.layers
    return {name: own.matrix.clone() for name, own in layers.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sum_is_that_of_clipped_whitened_gradients(reduction: str) -> None:
    plain, (x, target) = network(), batch()
    trainer = Trainer(network(), SHAPE, clipping_of(), max_grad_norm=0.7, reduction=reduction)
    for _ in range(2):
        matrices = matrices_of(trainer)
        assert set(matrices) == {"0", "3", "6", "9"}
        found = joint(trainer.released(x, target))
        total = torch.zeros_like(found)
        for i in range(len(x)):
            loss = linear_loss(plain(x[i : i + 1]), target[i : i + 1], "sum")
            own = [*torch.autograd.grad(loss, list(plain.parameters()))]
            for k, (name, _) in enumerate(plain.named_parameters()):
                layer, _, kind = name.partition(".")
                if layer in matrices and kind == "weight":
                    own[k] = whitened(own[k], matrices[layer])
            gradient = torch.cat([g.flatten() for g in own])
            total += gradient * min(1.0, 0.7 / float(gradient.norm()))
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)
        trainer.move(x, target, lr=0.5)
        plain.load_state_dict(trainer.plain.state_dict())
        changed = matrices_of(trainer)
        assert not any(torch.equal(matrices[name], changed[name]) for name in matrices)


@ALLOCATIONS
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 3), (6,)),
        (lambda: nn.Linear(6, 3, bias=False), (6,)),
        (lambda: nn.Linear(6, 3), (4, 6)),
        (lambda: nn.Linear(40, 50), (2, 40)),
        (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
        (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 7, 7)),
        (lambda: nn.Conv2d(32, 64, 3), (32, 4, 4)),
    ],
)
def test_a_large_example_reaches_the_limit(
    make: Callable[[], nn.Module], shape: tuple[int, ...], allocation: str
) -> None:
    """Through per-example gradients, products and single positions."""
    torch.manual_seed(0)
    model, public = make().double(), torch.randn(8, *shape)
    clipping = BackpropClipping(
        allocation=allocation,  # type: ignore[arg-type]
        whitening=InputWhitening(lambda _: public, power=0.5),
    )
    trainer = Trainer(model, shape, clipping, max_grad_norm=2.0)
    x = torch.randn(1, *shape).double()
    reached = joint(trainer.released(x, 1e4 * torch.ones(1, model(x).numel()).double())).norm()
    assert 0.999 * 2.0 <= reached <= 2.0


LONG: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: nn.Linear(400, 5), (400,)),
    "positions": (lambda: nn.Linear(60, 5), (3, 60)),
    "kept gradients": (lambda: nn.Linear(40, 5), (50, 40)),
    "convolution": (lambda: nn.Conv2d(16, 8, 5, stride=5), (16, 10, 10)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", LONG)
@ALLOCATIONS
def test_equal_examples_in_a_long_direction_stay_within_the_claim(
    kind: str, allocation: str, compiled: bool
) -> None:
    """Their sum is rounded in the short directions, too, which are scaled up afterwards."""
    torch.manual_seed(0)
    make, shape = LONG[kind]
    direction = torch.randn(shape[0] if kind == "convolution" else shape[-1])
    one = torch.ones(shape) * (direction.view(-1, 1, 1) if kind == "convolution" else direction)
    public = torch.randn(64, *(1,) * len(shape)) * one + 1e-4 * torch.randn(64, *shape)
    clipping = BackpropClipping(
        allocation=allocation,  # type: ignore[arg-type]
        whitening=InputWhitening(lambda _: public, power=0.5),
    )
    model, count = nn.Sequential(make(), nn.Flatten()), 3000
    trainer = Trainer(model, shape, clipping, dtype=torch.float32, reduction="sum")
    if compiled:
        torch._dynamo.reset()
        trainer.model = torch.compile(trainer.model, backend="aot_eager", fullgraph=True)
    g = torch.randn(model(one[None]).numel())
    x = torch.cat([one.expand(count, *shape), torch.randn(1, *shape)])
    target = torch.cat([g.expand(count, -1), 100 * torch.randn(1, g.numel())])
    trainer.optimizer.max_grad_norm = limit = 1e-3 * float(one.norm() * g.norm())
    moved = joint(trainer.released(x, target)).double()
    moved -= joint(trainer.released(x[:-1], target[:-1])).double()
    assert moved.norm() <= 1.01 * limit
    alone = joint(trainer.released(x[:1], target[:1])).norm()
    assert alone >= 0.9 * limit


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_rounded_products_are_not_scaled_up(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFloat-32 rounds the factors of float32 products to 11 bits, here made on a CPU."""

    def rounded(x: Tensor) -> Tensor:
        bits = x.view(torch.int32) + 0x1000
        return (bits & ~0x1FFF).view(torch.float32)

    times = WhitenedRule._times_matrix

    def tensor_float(self: WhitenedRule, rows: Tensor) -> Tensor:
        if rows.dtype == torch.float64:
            return times(self, rows)
        rule = WhitenedRule.of(self.one, rounded(self.matrix), self.stretch)
        return times(rule, rounded(rows.contiguous()))

    monkeypatch.setattr(WhitenedRule, "_times_matrix", tensor_float)
    monkeypatch.setattr(precision, "product_error", lambda _: 2.0**-11)
    torch.manual_seed(0)
    one, count = torch.randn(400), 1000
    public = torch.randn(64, 1) * one + 1e-4 * torch.randn(64, 400)
    clipping = BackpropClipping(whitening=InputWhitening(lambda _: public, power=power))
    trainer = Trainer(nn.Linear(400, 5), (400,), clipping, dtype=torch.float32, reduction="sum")
    g = torch.randn(5)
    x = torch.cat([one.expand(count, -1), torch.randn(1, 400)])
    target = torch.cat([g.expand(count, -1), 100 * torch.randn(1, 5)])
    trainer.optimizer.max_grad_norm = limit = 1e-3 * float(one.norm() * g.norm())
    moved = joint(trainer.released(x, target)).double()
    moved -= joint(trainer.released(x[:-1], target[:-1])).double()
    assert moved.norm() <= 1.02 * limit


def test_no_mean_in_single_precision_rounds_what_is_scaled_up() -> None:
    clipping = BackpropClipping(whitening=InputWhitening(lambda _: torch.randn(5, 4)))
    with pytest.raises(ValueError, match=r"whitening scales up what is .* or use whitening=None"):
        make_private(nn.Linear(4, 3), backprop=clipping)
    make_private(nn.Linear(4, 3), backprop=clipping, loss_reduction="sum")
    assert Trainer(nn.Linear(4, 3), (4,), clipping).optimizer  # in double precision


class Twice(nn.Module):
    """A layer that is used twice, and two that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return self.other(torch.tanh(self.one(y)))


def test_several_uses_are_whitened_alike_and_shared_weights_are_not() -> None:
    torch.manual_seed(0)
    model = Twice().double()
    plain = copy.deepcopy(model)
    whitening = InputWhitening(lambda _: torch.randn(5, 4), power=0.5)
    trainer = Trainer(model, (4,), BackpropClipping(whitening=whitening), max_grad_norm=0.3)
    matrices = matrices_of(trainer)
    assert set(matrices) == {"layer"}
    x, target = torch.randn(1, 4).double(), torch.ones(1, 4).double()
    found = trainer.released(x, target)
    own = torch.autograd.grad(linear_loss(plain(x), target, "sum"), [*plain.parameters()])
    named = dict(zip((name for name, _ in plain.named_parameters()), own, strict=True))
    named["layer.weight"] = whitened(named["layer.weight"], matrices["layer"])
    gradient = torch.cat([g.flatten() for g in named.values()])
    expected = gradient * min(1.0, 0.3 / float(gradient.norm()))
    torch.testing.assert_close(joint(found), expected, rtol=1e-9, atol=1e-12)


@ALLOCATIONS
def test_views_are_whitened_as_positions(allocation: str) -> None:
    x, target = batch(6)
    found = []
    for views in (1, 3):
        trainer = Viewed(network(), SHAPE, clipping_of(allocation), views=views, max_grad_norm=1e6)
        rows = x.unflatten(0, (-1, views)), target.unflatten(0, (-1, views)).transpose(1, 2)
        # The loss is a sum over the views here, and not a mean.
        found.append(joint(trainer.released(rows[0], rows[1].flatten(1))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@ALLOCATIONS
def test_compiled_sums_follow_the_matrices(allocation: str) -> None:
    torch._dynamo.reset()
    eager, compiled = (Trainer(network(), SHAPE, clipping_of(allocation)) for _ in range(2))
    compiled.model = torch.compile(compiled.model, backend="aot_eager", fullgraph=True)
    x, target = batch()
    before = counters["stats"]["unique_graphs"]
    for _ in range(3):
        one, other = (joint(each.released(x, target)) for each in (eager, compiled))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        eager.move(x, target)
        compiled.move(x, target)
    assert counters["stats"]["unique_graphs"] == before + 1


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


def test_checkpointed_layers_are_whitened_alike() -> None:
    x, target = batch()
    found = [
        joint(Trainer(make(network()), SHAPE, clipping_of()).released(x, target))
        for make in (lambda model: model, Checkpointed)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_a_matrix_is_kept_for_all_parts_of_a_logical_batch() -> None:
    learnt: list[int] = []
    whitening = InputWhitening(lambda step: learnt.append(step) or torch.randn(5, 4), every=1)
    clipping = BackpropClipping(whitening=whitening)
    private = make_private(nn.Linear(4, 3), backprop=clipping, loss_reduction="sum")
    assert learnt == [0]
    steps = 0
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=2, optimizer=private.optimizer
    ) as parts:
        for x, y in parts:
            private.optimizer.zero_grad()
            F.cross_entropy(private.model(x), y, reduction="sum").backward()
            private.optimizer.step()
            steps += not private.optimizer._is_last_step_skipped
            assert learnt == [*range(steps + 1)]
    assert steps == len(private.loader)
