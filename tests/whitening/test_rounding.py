"""Rounding errors of the sum over the batch, which whitening scales up, in many equal examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, InputWhitening
from opacus_bpclip.rules import precision
from opacus_bpclip.rules.whitened import PublicMatrix
from tests.checks import Trainer, joint
from tests.helpers import make_private
from tests.whitening.helpers import ALLOCATIONS

LONG: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: nn.Linear(400, 5), (400,)),
    "positions": (lambda: nn.Linear(60, 5), (3, 60)),
    "kept gradients": (lambda: nn.Linear(40, 5), (50, 40)),
    "gradients made twice": (lambda: nn.Linear(60, 50), (50, 60)),
    "long sequences convolution": (lambda: nn.Conv1d(4, 4, 3, padding=1), (4, 300)),
    "convolution": (lambda: nn.Conv2d(16, 8, 5, stride=5), (16, 10, 10)),
    "large convolution": (lambda: nn.Conv2d(64, 128, 3, padding=1, bias=False), (64, 4, 4)),
}


def kinds(*compiled_always: str) -> pytest.MarkDecorator:
    """Return a test of each kind, eager and compiled: to compile one takes 4 to 20 seconds.

    Those that are not named here are integration tests.
    """
    cases = [pytest.param(kind, False, id=f"{kind}-eager") for kind in LONG]
    for kind in LONG:
        marks = () if kind in compiled_always else (pytest.mark.integration,)
        cases.append(pytest.param(kind, True, id=f"{kind}-compiled", marks=marks))
    return pytest.mark.parametrize(("kind", "compiled"), cases)


def equal_examples(
    kind: str, count: int, allocation: str, compiled: bool
) -> tuple[Trainer, Tensor, Tensor]:
    """Return so many equal examples in a direction in which public ones are long, at the limit."""
    torch.manual_seed(0)
    make, shape = LONG[kind]
    image = "convolution" in kind
    direction = torch.randn(shape[0] if image else shape[-1])
    one = torch.ones(shape) * (direction.view(-1, *(1,) * (len(shape) - 1)) if image else direction)
    public = torch.randn(64, *(1,) * len(shape)) * one + 1e-4 * torch.randn(64, *shape)
    clipping = BackpropClipping(
        allocation=allocation,  # type: ignore[arg-type]
        whitening=InputWhitening(lambda _: public, power=0.5),
    )
    model = nn.Sequential(make(), nn.Flatten())
    trainer = Trainer(model, shape, clipping, dtype=torch.float32, reduction="sum")
    if compiled:
        torch._dynamo.reset()
        trainer.model = torch.compile(trainer.model, backend="aot_eager", fullgraph=True)
    g = torch.randn(model(one[None]).numel())
    trainer.optimizer.max_grad_norm = 1e-3 * float(one.norm() * g.norm())
    return trainer, one.expand(count, *shape), g.expand(count, -1)


def moved_by(trainer: Trainer, x: Tensor, target: Tensor, more: tuple[Tensor, Tensor]) -> float:
    """Return by how much of its claim one example more moves the sum."""
    moved = joint(trainer.released(torch.cat([x, more[0]]), torch.cat([target, more[1]]))).double()
    moved -= joint(trainer.released(x, target)).double()
    return float(moved.norm()) / trainer.optimizer.max_grad_norm


@kinds("kept gradients", "convolution")
@ALLOCATIONS
def test_equal_examples_in_a_long_direction_stay_within_the_claim(
    kind: str, allocation: str, compiled: bool
) -> None:
    """What rounds their gradients in the short directions is scaled up."""
    trainer, x, target = equal_examples(kind, 3000, allocation, compiled)
    more = torch.randn(1, *x.shape[1:]), 100 * torch.randn(1, target.shape[1])
    # A compiled graph adds up all examples at once, also without whitening.
    assert moved_by(trainer, x, target, more) <= (1.003 if compiled else 1.001)
    alone = joint(trainer.released(x[:1], target[:1])).norm()
    # The margin grows with the number of positions.
    assert alone >= (0.4 if "long" in kind else 0.75) * trainer.optimizer.max_grad_norm


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@kinds("large convolution")
@pytest.mark.parametrize("count", [768, 1024])
def test_an_example_of_zeros_moves_nothing(count: int, kind: str, compiled: bool) -> None:
    """With the size of the batch, kernels change the order in which they add its examples up."""
    trainer, x, target = equal_examples(kind, count, "joint", compiled)
    zeros = torch.zeros_like(x[:1]), torch.zeros_like(target[:1])
    assert moved_by(trainer, x, target, zeros) <= (0.01 if compiled else 0.005)


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_rounded_products_are_not_scaled_up(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFloat-32 rounds the factors of float32 products to 11 bits, here made on a CPU."""

    def rounded(x: Tensor) -> Tensor:
        bits = x.view(torch.int32) + 0x1000
        return (bits & ~0x1FFF).view(torch.float32)

    times = PublicMatrix.times

    def tensor_float(self: PublicMatrix, rows: Tensor) -> Tensor:
        if rows.dtype == torch.float64:
            return times(self, rows)
        along = rounded(rows.contiguous()) @ rounded(self.directions)
        back = rounded(along * self.shrinkage) @ rounded(self.directions.mT.contiguous())
        return self.scale * (rows - back)

    monkeypatch.setattr(PublicMatrix, "times", tensor_float)
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
