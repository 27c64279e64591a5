"""Gradients that cancel over positions or uses, in many equal examples behind a plain mean.

What remains is rounding, which follows the batch's size in the same way in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import (
    BackpropClipHooks,
    BackpropClipping,
    PrivacyEngine,
    PrivacyViolationError,
)
from opacus_bpclip.clipping import together
from opacus_bpclip.rules import precision
from tests.checks import Trainer, joint
from tests.helpers import make_private

EXAMPLES = 2000


def moved_by_one_more(
    model: nn.Module,
    clipping: BackpropClipping,
    one: Tensor,
    g: Tensor,
    examples: int = EXAMPLES,
    reduction: str = "mean",
) -> float:
    """Return how far one more example moves the sum, in units of the claim, at the worst limit.

    Args:
        model: maps ``one`` to as many outputs as ``g`` has entries.
        clipping: the options.
        one: the input of all examples but the last, which is zero.
        g: the gradient of their outputs, which cancels in the parameters'.
        examples: how many equal ones there are.
        reduction: of the loss.
    """
    trainer = Trainer(model, tuple(one.shape), clipping, dtype=torch.float32, reduction=reduction)
    x = torch.cat([one.expand(examples, *one.shape), torch.zeros(1, *one.shape)])
    target = torch.cat([g.flatten().expand(examples, -1), torch.zeros(1, g.numel())])
    worst = 0.0
    for part in (1e-6, 6.5e-6, 2e-5):
        trainer.optimizer.max_grad_norm = limit = part * float(one.norm() * g.norm())
        sums = (joint(trainer.released(x[:k], target[:k])) for k in (examples + 1, examples))
        with_it, without = (each.double() for each in sums)
        worst = max(worst, float((with_it - without).norm()) / limit)
    return worst


def cancelling(parts: int, entries: int) -> Tensor:
    """Return gradients whose sum over the parts is zero. ``[parts, entries]``."""
    g = torch.randn(parts, entries)
    g[-1] = -g[:-1].sum(dim=0)
    return g


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("allocation", ["joint", "equal"])
@pytest.mark.parametrize("positions", range(2, 10))
def test_positions_that_cancel_leave_less_than_the_claim(
    positions: int, allocation: str, bias: bool
) -> None:
    """For some numbers of positions, norms come from products, for others from Gram matrices."""
    torch.manual_seed(0)
    one = torch.randn(6).expand(positions, 6)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias))
    clipping = BackpropClipping(allocation=allocation)  # type: ignore[arg-type]
    assert moved_by_one_more(model, clipping, one, cancelling(positions, 5)) < 0.1


class Uses(nn.Module):
    """A layer that is used three times on the same input, or layers that share its weight."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        for layer in layers[1:]:
            layer.weight = layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers if len(self.layers) > 1 else [*self.layers] * 3
        return torch.cat([layer(x).flatten(1) for layer in layers], dim=1)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Uses(nn.Linear(6, 5)), (6,)),
    "convolution": (lambda: Uses(nn.Conv1d(2, 3, 3)), (2, 6)),
    "transposed": (lambda: Uses(nn.ConvTranspose1d(2, 3, 3, bias=False)), (2, 6)),
    "prelu": (lambda: Uses(nn.PReLU()), (6,)),
    "layer norm": (lambda: Uses(nn.LayerNorm(6)), (6,)),
    "group norm": (lambda: Uses(nn.GroupNorm(1, 2)), (2, 6)),
    "tied": (lambda: Uses(*(nn.Conv1d(2, 3, 3, bias=False) for _ in range(3))), (2, 6)),
}


class TiedHead(nn.Module):
    """An embedding whose weight is the output head's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        token, state = x[:, 0].long(), x[:, 1:]
        return torch.cat([self.embedding(token), self.head(state)], dim=1)


@pytest.fixture(params=["added up first", "too large for that"])
def most(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Have several uses' gradients added up by example or not; return what may be left of them."""
    if request.param == "added up first":
        return 0.2
    monkeypatch.setattr(together, "_OWN_MOST", 0)
    return 0.4


@pytest.mark.parametrize("kind", LAYERS)
def test_uses_that_cancel_leave_less_than_the_claim(kind: str, most: float) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    model, one = make(), torch.randn(shape)
    outputs = model(one[None]).shape[1]
    g = cancelling(3, outputs // 3)
    # This layer has per-example gradients one by one alone.
    examples = EXAMPLES // 5 if kind == "transposed" else EXAMPLES
    assert moved_by_one_more(model, BackpropClipping(), one, g, examples) < most


def test_a_tied_embedding_that_cancels_its_head_leaves_less_than_the_claim(most: float) -> None:
    torch.manual_seed(0)
    state, at_head = torch.randn(6), torch.zeros(7)
    at_head[3] = 1.7
    one = torch.cat([torch.tensor([3.0]), state])
    g = torch.cat([-1.7 * state, at_head])
    assert moved_by_one_more(TiedHead(), BackpropClipping(), one, g) < most


def between_layers() -> nn.Module:
    """Return two layers; a gradient of equal entries cancels on its way through the upper one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    weight = model[1].weight.detach()
    weight[2] = -weight[0] - weight[1]
    return model


UNCLIPPED = BackpropClipping(allocation="equal", propagate="unclipped")


@pytest.mark.parametrize(
    ("clipping", "reduction"),
    [
        pytest.param(BackpropClipping(), "mean", id="joint"),
        pytest.param(BackpropClipping(allocation="equal"), "mean", id="clipped"),
        pytest.param(UNCLIPPED, "sum", id="unclipped"),
    ],
)
def test_what_cancels_between_layers_leaves_less_than_the_claim(
    clipping: BackpropClipping, reduction: str
) -> None:
    model, one, g = between_layers(), torch.randn(6), torch.full((3,), 1.37)
    assert moved_by_one_more(model, clipping, one, g, reduction=reduction) < 0.1


def test_no_mean_in_single_precision_rounds_what_layers_pass_on_unclipped() -> None:
    refused = pytest.raises(ValueError, match=r"equal examples at once\. Pass the criterion")
    with refused:
        make_private(between_layers(), backprop=UNCLIPPED)
    with refused:
        BackpropClipHooks(between_layers(), config=UNCLIPPED)
    BackpropClipHooks(between_layers().double(), config=UNCLIPPED)
    BackpropClipHooks(between_layers(), config=BackpropClipping(propagate="unclipped"))


@pytest.mark.parametrize("rounded", [0.0, 2.0**-9], ids=["exact products", "TensorFloat-32"])
def test_the_margin_takes_little_where_uses_do_not_cancel(
    rounded: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's defaults allow TensorFloat-32 on a GPU, also to a model that has no convolution."""
    monkeypatch.setattr(together, "_OWN_MOST", 0)
    monkeypatch.setattr(precision, "product_error", lambda _: rounded)
    torch.manual_seed(0)
    trainer = Trainer(TiedHead(), (7,), BackpropClipping(), dtype=torch.float32)
    x, target = torch.randn(1, 7), 100 * torch.randn(1, 13)
    x[:, 0] = 3.0
    part = joint(trainer.released(x, target)).norm() / trainer.optimizer.max_grad_norm
    assert 0.94 < part <= 1


MANY = TensorDataset(torch.zeros(10_000, 6), torch.zeros(10_000, dtype=torch.long))


def step_on(
    rows: int, expected: int, *, dtype: torch.dtype = torch.float32, **options: Any
) -> None:
    """Step on so many examples at once where so many are expected in a step."""
    data = TensorDataset(MANY.tensors[0].to(dtype), MANY.tensors[1])
    model = between_layers().to(dtype)
    private = make_private(model, data=data, batch_size=expected, **options)
    reduction = options.get("loss_reduction", "mean")
    x, y = data[:rows]
    F.cross_entropy(private.model(x), y, reduction=reduction).backward()
    private.optimizer.step()


def test_no_mean_in_single_precision_sums_very_many_examples() -> None:
    refused = pytest.raises(
        PrivacyViolationError, match=r"About 5,000 examples are .* into parts of at most 2,048\."
    )
    for rows in (5000, 2049):
        with refused:
            step_on(rows, 5000)
    # What need not be refused, and the remedies.
    step_on(4500, 2500)
    step_on(2048, 5000)
    step_on(5000, 5000, loss_reduction="sum")
    step_on(5000, 5000, dtype=torch.float64)
    private, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=(model := between_layers()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(MANY, batch_size=5000),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    optimizer._guard.passes.samples.attached = False
    x, y = MANY[:5000]
    criterion(private(x), y).backward()
    optimizer.step()
