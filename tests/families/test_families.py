"""Models as their libraries build them: they train, and one example moves the sum within its limit.

All of them with both budgets: ``pytest -m slow tests/families``. A few run always.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from opacus_bpclip import BackpropClipping, PrivacyEngine
from tests.families import adapters, diffusion, pictures, text
from tests.families.family import FAMILIES, Family

assert FAMILIES, (adapters, diffusion, pictures, text)

# One of each kind: plain, root mean square norms, relative positions and two inputs, pictures with
# tokens, windows, adapters.
pytestmark = pytest.mark.filterwarnings("ignore")  # The libraries' own.

ALWAYS = ("bert-class", "llama-causal", "t5", "vit", "swin", "bert-lora", "llama-prefix-projected")


class _Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.batch.items()}


def _built(family: Family) -> nn.Module:
    torch.manual_seed(0)
    model = PrivacyEngine.get_compatible_module(family.build(), clipping="backprop").train()
    for module in model.modules():
        # What draws numbers: runs are compared.
        for name in ("p", "drop_prob", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class _Private:
    """A family's model behind the real engine."""

    def __init__(
        self,
        family: Family,
        allocation: str,
        *,
        lr: float = 0.0,
        noise: float = 0.0,
        reduction: str = "mean",
        low: bool = False,
    ) -> None:
        model = _built(family)
        self.low = low
        if low:
            model = model.bfloat16()
        self.family, self.trained = family, _trained(model)
        self.model, self.optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=torch.optim.SGD(self.trained, lr=lr),
            data_loader=DataLoader(_Rows(self.cast(family.data(16))), batch_size=8),
            noise_multiplier=noise,
            max_grad_norm=1.0,
            loss_reduction=reduction,
            poisson_sampling=False,
            clipping="backprop",
            backprop=BackpropClipping(allocation=allocation),
        )
        self.optimizer.keep_summed_grad = True
        self.optimizer._guard.passes.samples.attached = False

    def cast(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = torch.bfloat16 if self.low else torch.float32
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}

    def summed(self, batch: dict[str, Tensor], limit: float = 1.0) -> Tensor:
        self.optimizer.max_grad_norm = limit
        self.optimizer.zero_grad()
        (20 * self.family.losses(self.model, batch).mean()).backward()
        self.optimizer.step()
        return torch.cat([p.summed_grad.detach().double().flatten() for p in self.trained])


def _check(family: Family, allocation: str) -> None:
    batch = family.data(4)
    # To try a large model out takes seconds, so that one serves for all limits.
    private = _Private(family, allocation)
    _check_whole_gradient(private, batch)
    for limit in (1.0, 30.0):
        whole = private.summed(batch, limit)
        for left_out in (0, 3):
            kept = [row for row in range(4) if row != left_out]
            rest = private.summed({name: values[kept] for name, values in batch.items()}, limit)
            assert (whole - rest).norm() <= limit * 1.0001
    private = _Private(family, allocation, lr=0.1, noise=1.0)
    before = [p.detach().clone() for p in private.trained]
    private.summed(family.data(8))
    assert not any(torch.equal(a, b) for a, b in zip(before, private.trained, strict=True))
    assert all(p.isfinite().all() for p in private.trained)


def _check_whole_gradient(private: _Private, batch: dict[str, Tensor]) -> None:
    """With a limit that no example reaches, each parameter has autograd's gradient."""
    plain = _built(private.family)
    trained = _trained(plain)
    loss = 20 * private.family.losses(plain, batch).sum()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    private.summed(batch, 1e9)
    largest = max(float(g.norm()) for g in gradients if g is not None)
    for own, parameter in zip(gradients, private.trained, strict=True):
        expected = torch.zeros_like(parameter) if own is None else own
        gap = float((parameter.summed_grad - expected).norm())
        assert gap <= 1e-4 * largest + 1e-3 * float(expected.norm())


@pytest.mark.parametrize("name", ALWAYS)
def test_one_of_each_kind_trains_within_its_sensitivity(name):
    _check(FAMILIES[name], "joint")


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["joint", "dimension"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_trains_within_its_sensitivity(name, allocation):
    _check(FAMILIES[name], allocation)


def _check_low_precision(family: Family, *, autocast: bool) -> None:
    """In bfloat16 a sum is that of the examples' parts, none of which is beyond the limit."""
    private = _Private(family, "joint", reduction="sum", low=not autocast)
    rows = torch.eye(4) * torch.tensor([1.0, 1.0, 1.0, 1e3])

    def summed(weights: Tensor) -> Tensor:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = family.losses(private.model, private.cast(family.data(4)))
        private.optimizer.zero_grad()
        (losses * weights.to(losses)).sum().backward()
        private.optimizer.step()
        return torch.cat([p.summed_grad.double().flatten() for p in private.trained])

    parts = [summed(row) for row in rows]
    assert (summed(rows.sum(0)) - sum(parts)).norm() <= 1e-5
    assert all(part.norm() <= 1 for part in parts)
    assert parts[-1].norm() >= 0.99


WAYS = pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])


@WAYS
@pytest.mark.parametrize("name", ["bert-lora", "llama-causal"])
def test_one_of_two_kinds_trains_in_bfloat16(name, autocast):
    _check_low_precision(FAMILIES[name], autocast=autocast)


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_trains_in_bfloat16(name, autocast):
    _check_low_precision(FAMILIES[name], autocast=autocast)
