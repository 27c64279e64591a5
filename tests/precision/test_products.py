"""Products of float32 numbers in less precision, as torch lets its users ask for."""

import pytest
import torch
from torch import nn

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from opacus_bpclip.guard.precision import kinds_of_products
from opacus_bpclip.rules.precision import product_error, products_are_rounded, rounding_margin
from tests.checks import HUGE, Trainer, check_sensitivity, joint

CPU = torch.device("cpu")
WIDTH = 64


@pytest.fixture
def _medium():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def _trainer(**options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    return Trainer(model, (WIDTH,), BackpropClipping(), dtype=torch.float32, **options)


def test_they_are_float32s_own_by_default():
    assert product_error(CPU) == 0
    assert not products_are_rounded(CPU, ["matmul", "conv"])
    assert rounding_margin(torch.float32, CPU) < 1e-5
    assert product_error(torch.device("cuda")) == 2.0**-9  # of convolutions, cuDNN's default


def test_of_a_device_that_torch_has_no_option_for_the_worst_is_assumed():
    assert product_error(torch.device("mps")) == 2.0**-7
    assert product_error(torch.device("meta")) == 0


@pytest.mark.usefixtures("_medium")
def test_what_is_allowed_is_in_the_margin():
    assert product_error(CPU) == 2.0**-7
    assert rounding_margin(torch.float32, CPU) > 2.0**-7
    assert rounding_margin(torch.float64, CPU) < 1e-12
    trainer = _trainer(reduction="sum")
    x, target = torch.randn(40, WIDTH), HUGE * torch.randn(40, WIDTH)
    check_sensitivity(trainer, x, target)
    assert joint(trainer.released(x[:1], target[:1])).norm() <= 1


@pytest.mark.usefixtures("_medium")
@pytest.mark.parametrize("rounds", [True, False])
def test_a_mean_is_refused_where_the_machine_rounds(rounds, monkeypatch):
    monkeypatch.setattr("opacus_bpclip.rules.precision._rounds_products", lambda *_: rounds)
    trainer = _trainer()
    x, target = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    if not rounds:
        trainer.step(x, target)
        return
    with pytest.raises(PrivacyViolationError) as refusal:
        trainer.step(x, target)
    assert str(refusal.value) == (
        "Products of float32 numbers are rounded on the device cpu "
        "(torch.set_float32_matmul_precision, or torch.backends.mkldnn.conv.fp32_precision), and "
        "the loss is a mean: it divides every gradient by the batch's size, which is private, and "
        "the quotient is then rounded so coarsely that one example would change the gradients of "
        "all others. Pass criterion= to make_private and compute the loss with what it returns, "
        'use a sum with loss_reduction="sum", or set the two options to "highest" and "ieee".'
    )
    torch.set_float32_matmul_precision("highest")
    trainer.step(x, target)


@pytest.mark.usefixtures("_medium")
def test_whether_the_machine_rounds_is_found_by_a_product():
    x = torch.full((64, 64), 1 + 2.0**-12)
    assert products_are_rounded(CPU, ["matmul"]) == bool((x @ torch.eye(64) != x).any())


def test_of_convolutions_only_models_with_kernels_are_asked():
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        _trainer().step(torch.randn(3, WIDTH), torch.randn(3, WIDTH))
        assert product_error(CPU) == 2.0**-7
    finally:
        torch.backends.mkldnn.conv.fp32_precision = "none"
    images = nn.Sequential(nn.Conv1d(1, 1, 3), nn.Linear(2, 2))
    assert kinds_of_products(images.parameters()) == ("matmul", "conv")
    assert kinds_of_products(images[1].parameters()) == ("matmul",)


def test_what_was_found_under_other_settings_does_not_count():
    x = torch.full((64, 64), 1 + 2.0**-12)
    torch.backends.mkldnn.rnn.fp32_precision = "bf16"
    try:
        assert not products_are_rounded(CPU, ["matmul"])
        torch.set_float32_matmul_precision("medium")
        assert products_are_rounded(CPU, ["matmul"]) == bool((x @ torch.eye(64) != x).any())
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.rnn.fp32_precision = "none"
