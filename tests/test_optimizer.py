"""One step is one mechanism: its divisor, its entry in the accountant, its attributes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from opacus.accountants import create_accountant
from torch import Tensor, nn

from opacus_bpclip import BackpropClipOptimizer, PrivacyEngine, PrivacyViolationError
from opacus_bpclip.optimizer import fingerprint
from tests.helpers import (
    FEATURES,
    backward,
    batch,
    flat,
    loss_of,
    make_private,
    mlp,
    one_layer,
    seeded,
    summed,
    train_step,
    values,
)


@pytest.mark.parametrize("size", [1, 6, 20])
def test_the_divisor_is_the_expected_batch_size_and_not_the_private_one(size: int) -> None:
    private = make_private(mlp())
    train_step(private, size)
    assert private.optimizer.expected_batch_size == 8
    for p in private.parameters:
        assert torch.equal(p.grad, p.summed_grad / 8)


def test_a_sum_is_not_divided_and_clips_the_same_gradients() -> None:
    mean, total = make_private(mlp()), make_private(mlp(), loss_reduction="sum")
    train_step(mean)
    x, y = batch()
    F.cross_entropy(total.model(x), y, reduction="sum").backward()
    total.optimizer.step()
    torch.testing.assert_close(summed(total), summed(mean))
    for p in total.parameters:
        assert torch.equal(p.grad, p.summed_grad)


def test_the_optimizer_refuses_another_reduction_than_the_models() -> None:
    private = make_private(mlp())
    with pytest.raises(ValueError, match="Expected loss_reduction='sum' to be the model's, 'mean'"):
        BackpropClipOptimizer(
            private.optimizer.original_optimizer,
            hooks=private.handle,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            expected_batch_size=8,
            loss_reduction="sum",
        )


@pytest.mark.parametrize("accountant", ["rdp", "gdp", "prv"])
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")  # Opacus's own caution
def test_epsilon_is_what_opacus_computes_for_one_entry_a_step(accountant: str) -> None:
    private = make_private(mlp(), engine=PrivacyEngine(accountant=accountant), noise_multiplier=1.1)
    for _ in range(3):
        train_step(private)
    alone = create_accountant(accountant)
    for _ in range(3):
        alone.step(noise_multiplier=1.1, sample_rate=8 / 32)
    assert private.engine.accountant.history == alone.history
    assert private.engine.get_epsilon(1e-5) == alone.get_epsilon(1e-5)


def test_epsilon_does_not_depend_on_the_number_of_layers() -> None:
    deep = nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(5)))
    shallow, deep = (make_private(m, noise_multiplier=1.0) for m in (one_layer(), deep))
    train_step(shallow)
    train_step(deep)
    assert shallow.engine.get_epsilon(1e-5) == deep.engine.get_epsilon(1e-5)


def test_a_closure_runs_once_and_its_loss_is_returned() -> None:
    plain, closed = seeded(), seeded()
    losses: list[Tensor] = []

    def closure() -> Tensor:
        closed.optimizer.zero_grad()
        losses.append(loss_of(closed.model, *batch()))
        losses[-1].backward()
        return losses[-1]

    with torch.no_grad():
        returned = closed.optimizer.step(closure)
    train_step(plain)
    assert len(losses) == 1
    assert returned is losses[0]
    assert torch.equal(values(closed), values(plain))
    assert closed.steps == 1


def test_a_step_without_a_closure_returns_nothing() -> None:
    assert make_private(mlp()).optimizer.step() is None


def test_a_parameter_that_is_added_to_the_optimizer_later_is_refused() -> None:
    private, extra = make_private(mlp()), nn.Parameter(torch.ones(3))
    private.optimizer.add_param_group({"params": [extra]})
    before = values(private)
    (private.model(batch()[0]) + extra).sum().backward()
    with pytest.raises(PrivacyViolationError) as refusal:
        private.optimizer.step()
    assert str(refusal.value) == (
        "The optimizer holds a parameter of shape (3,) that was not a trainable parameter of the "
        "model when make_private was called, so its gradient is not clipped. Add it to the model "
        "and the optimizer first, then call make_private."
    )
    assert torch.equal(values(private), before)
    assert private.steps == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_empties_gradients_and_sums(set_to_none: bool) -> None:
    private = make_private(mlp())
    train_step(private)
    private.optimizer.zero_grad(set_to_none=set_to_none)
    for p in private.parameters:
        assert p.summed_grad is None
        assert p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros_like(p))
    reference = make_private(mlp())
    train_step(reference)
    train_step(reference)
    backward(private)
    private.optimizer.step()
    assert torch.equal(values(private), values(reference))


def test_zero_grad_before_the_step_throws_the_batch_away() -> None:
    private = make_private(mlp())
    backward(private)
    private.optimizer.zero_grad()
    private.optimizer.step()
    assert not summed(private).any()


def test_gradients_are_where_opacus_keeps_them() -> None:
    private, silent = seeded(), seeded(noise_multiplier=0.0)
    assert all(p.summed_grad is None and p.grad is None for p in private.parameters)
    train_step(private)
    train_step(silent)
    assert torch.equal(summed(private), summed(silent))
    for p, q in zip(private.parameters, silent.parameters, strict=True):
        assert torch.equal(q.grad, q.summed_grad / 8)
        assert not torch.allclose(p.grad, q.grad, atol=1e-3)


@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "hooks only"])
def test_no_parameter_ever_has_a_grad_sample(wrap_model: bool) -> None:
    private = make_private(mlp(), wrap_model=wrap_model)

    def check() -> None:
        for p in private.model.parameters():
            assert not {"grad_sample", "_forward_counter", "_norm_sample"} & set(vars(p))

    check()
    loss = loss_of(private.model, *batch())
    check()
    loss.backward()
    check()
    private.optimizer.step()
    check()
    private.optimizer.zero_grad()
    private.handle.set_grad_sample_to_none()
    private.handle.del_grad_sample()
    private.model.zero_grad()
    check()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), id="SGD"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.1), id="AdamW"),
        pytest.param(
            lambda p: torch.optim.SGD([{"params": p[:2], "lr": 1.0}, {"params": p[2:]}], lr=0.1),
            id="groups",
        ),
    ],
)
def test_the_wrapped_optimizer_does_the_step(make: Callable[..., torch.optim.Optimizer]) -> None:
    private, reference = make_private(mlp()), mlp()
    inner = make(private.parameters)
    private.optimizer.original_optimizer = inner
    plain = make(list(reference.parameters()))
    schedule = torch.optim.lr_scheduler.StepLR(private.optimizer, step_size=1, gamma=0.5)
    plain_schedule = torch.optim.lr_scheduler.StepLR(plain, step_size=1, gamma=0.5)
    for _ in range(3):
        train_step(private)
        for p, q in zip(private.parameters, reference.parameters(), strict=True):
            q.grad = p.grad.clone()
        plain.step()
        schedule.step()
        plain_schedule.step()
    assert torch.equal(values(private), flat(reference.parameters()))
    state = private.optimizer.state_dict()
    assert state.pop(fingerprint.KEY)
    assert state.pop("noise_place")
    assert state == inner.state_dict()


def test_nothing_without_noise_outlives_a_step_unless_asked():
    private = make_private(mlp(), noise_multiplier=1.0)
    private.optimizer.keep_summed_grad = False
    train_step(private)
    assert all(p.summed_grad is None and p.grad is not None for p in private.parameters)
