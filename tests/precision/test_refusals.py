"""What cannot be bounded in low precision is refused, and the remedies work."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import (
    AdaptiveThreshold,
    BackpropClipping,
    InputWhitening,
    PrivacyEngine,
    PrivacyViolationError,
)
from tests.checks import Trainer, check_independence, joint

LOW = torch.bfloat16
X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
MEAN = (
    "{name} computes in torch.bfloat16, and the loss is a mean: it divides every gradient by the "
    "batch's size, which is private, and the quotient is then rounded so coarsely that one example "
    "would change the gradients of all others. Pass criterion= to make_private and compute the "
    'loss with what it returns, or use a sum with loss_reduction="sum".'
)


class Between(nn.Module):
    """Layers in float32, with something in low precision between them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x).to(LOW)).float())


class Adapted(nn.Module):
    """A frozen layer in low precision behind an adapter in float32, as models are fine-tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter, self.base = nn.Linear(4, 4), nn.Linear(4, 3, dtype=LOW)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.adapter(x).to(LOW)).float()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def private(model: nn.Module, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(X.to(next(model.parameters()).dtype), Y), 3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        clipping="backprop",
        **options,
    )


def test_a_mean_of_low_precision_parameters_is_refused_before_training():
    with pytest.raises(ValueError, match="computes in") as refusal:
        private(plain().to(LOW))
    assert str(refusal.value) == MEAN.format(name="0.weight")


@pytest.mark.parametrize(
    ("make", "autocast", "name"),
    [
        (plain, True, "0"),
        (Between, False, "A part of the model"),
        (Adapted, False, "A part of the model"),
    ],
    ids=["autocast", "between layers", "behind an adapter"],
)
def test_a_mean_whose_gradients_are_rounded_is_refused(make, autocast, name):
    model, optimizer, _ = private(make())
    with (
        pytest.raises(PrivacyViolationError) as refusal,
        torch.autocast("cpu", LOW, enabled=autocast),
    ):
        model(X)
    assert str(refusal.value) == MEAN.format(name=name)
    # The loss may have been computed all the same.
    with pytest.raises(PrivacyViolationError, match="not covered"):
        optimizer.step()


@pytest.mark.parametrize("make", [plain, Between, Adapted])
@pytest.mark.parametrize("remedy", ["criterion", "sum"])
def test_the_remedies_train_within_the_bound(make, remedy):
    torch.manual_seed(0)
    options = {"criterion": nn.MSELoss()} if remedy == "criterion" else {"reduction": "sum"}
    trainer = (
        Trainer(
            make(), (4,), BackpropClipping(), dtype=torch.float32, autocast=make is plain, **options
        )
        if make is not Adapted
        else _adapted(options)
    )
    check_independence(trainer, X, torch.randn(6, 3))
    assert joint(trainer.released(X[:1], torch.full((1, 3), 1e4))).norm() <= 1


def _adapted(options):
    # `Trainer` turns all parameters to one dtype.
    trainer = Trainer(Adapted(), (4,), BackpropClipping(), dtype=torch.float32, **options)
    trainer.plain.base.to(LOW)
    return trainer


def test_a_frozen_backbone_that_no_gradient_goes_through_is_fine():
    model = Adapted()
    model.adapter, model.base = nn.Linear(4, 4, dtype=LOW).requires_grad_(False), nn.Linear(4, 3)
    model.forward = lambda x: model.base(model.adapter(x.to(LOW)).float())
    made, optimizer, _ = private(model)
    nn.functional.cross_entropy(made(X), Y).backward()
    optimizer.step()


def test_half_precision_is_refused():
    model, _, _ = private(plain(), loss_reduction="sum")
    with (
        pytest.raises(PrivacyViolationError) as refusal,
        torch.autocast("cpu", torch.float16),
    ):
        model(X)
    assert str(refusal.value) == (
        "0 computes in torch.float16, whose largest number is so small that training needs a "
        "GradScaler, and its scale depends on the data. Use torch.bfloat16, by autocast or for "
        "the whole model, or torch.float32."
    )


def float_between() -> nn.Module:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().double()

    return nn.Sequential(nn.Linear(4, 4), Cast(), nn.Linear(4, 3))


OPTIONS = {
    "unclipped": BackpropClipping(allocation="equal", propagate="unclipped"),
    "threshold": BackpropClipping(threshold=AdaptiveThreshold()),
    "whitening": BackpropClipping(whitening=InputWhitening(lambda _: torch.randn(5, 4).double())),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rounded", ["nowhere", "the model later", "a part", "the loss"])
def test_options_that_need_double_precision_behind_a_mean(option: str, rounded: str) -> None:
    made = plain() if rounded != "a part" else float_between()
    model, optimizer, _ = private(made.double(), backprop=OPTIONS[option])
    x = X.double()
    if rounded == "the model later":
        model.float()
        x = x.float()
    elif rounded == "nowhere":
        nn.functional.cross_entropy(model(x), Y).backward()
        optimizer.step()
        return

    def train() -> None:
        out = model(x)
        nn.functional.cross_entropy(out.float() if rounded == "the loss" else out, Y).backward()

    with pytest.raises(PrivacyViolationError, match="every example's gradient is rounded by the "):
        train()
    with pytest.raises(PrivacyViolationError, match="not covered by the guarantee"):
        optimizer.step()
