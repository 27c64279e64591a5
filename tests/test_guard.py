"""On every batch, whatever is not covered is caught on that batch, and training can go on after."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_bpclip import PrivacyViolationError
from tests.helpers import (
    Convolutional,
    Private,
    Step,
    Switchable,
    assert_refused_until_zero_grad,
    backward,
    batch,
    flat,
    loss_of,
    make_private,
    model_of,
    summed,
    switchable,
    train_step,
    tricked,
)


@dataclasses.dataclass
class Output:
    logits: Tensor


def extra_loss(extra: Callable[[Switchable], Tensor]) -> Step:
    """One batch with another term in the loss."""

    def step(private: Private) -> None:
        (loss_of(private.model, *batch()) + extra(model_of(private))).backward()

    return step


def call_outside(private: Private) -> None:
    model_of(private).head(model_of(private).body(batch()[0]))


def loss_on_hidden_alone(private: Private) -> None:
    private.model(batch()[0])
    model_of(private).hidden.mean().backward()


def backward_twice(private: Private) -> None:
    loss = loss_of(private.model, *batch())
    loss.backward(retain_graph=True)
    loss.backward()


def input_gradient_first(private: Private) -> None:
    x = batch()[0].requires_grad_()
    loss = loss_of(private.model, x, batch()[1])
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()


def under_autocast(private: Private) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(private.model, *batch()).backward()


def reentrant(model: Switchable, x: Tensor) -> Tensor:
    return model.head(checkpoint(model.body, x.clone().requires_grad_(), use_reentrant=True))


MORE_THAN_ONCE = (
    "head is used more than once in a forward pass: each use adds to one example's contribution, "
    "and the bound counts 1. Give each use its own layer, or declare how many there are: "
    "BackpropClipping(uses={'head': ...})."
)
DIRECT = (
    "Use the parameter through its layer only, not directly as F.linear(x, layer.weight) does. In "
    "place of a penalty on the weights in the loss, give the optimizer weight_decay, or shrink the "
    "weights after its step"
)
FOREIGN = (
    f"head.weight got gradient from outside its layer's call, and nothing bounds it. {DIRECT}."
)
TWICE = (
    "The backward pass ran twice for one forward pass through {name}: one example would contribute "
    "twice. Add the losses and call backward once."
)


@pytest.mark.parametrize(
    ("misbehave", "message"),
    [
        pytest.param(
            tricked(lambda m, x: m.head(m.body(x)) + m.head(torch.zeros(len(x), 8))),
            MORE_THAN_ONCE,
            id="layer called twice",
        ),
        pytest.param(
            extra_loss(lambda m: F.linear(m.hidden.detach(), m.head.weight).mean()),
            FOREIGN,
            id="F.linear in the loss",
        ),
        pytest.param(
            extra_loss(lambda m: m.head.weight.square().sum()),
            FOREIGN,
            id="weight penalty in the loss",
        ),
        pytest.param(
            lambda p: model_of(p).head.weight.square().sum().backward(),
            FOREIGN,
            id="weight penalty alone",
        ),
        pytest.param(
            tricked(lambda m, x: m.head(m.body(x[:1]).expand(len(x), 8))),
            "body got an input of shape (1, 4) in a batch of 6 examples: its first axis must be "
            "the batch, or one factor would scale a mix of examples. Expand inputs that are shared "
            "by the batch (such as position embeddings) and keep the batch axis first.",
            id="one row broadcast over the batch",
        ),
        pytest.param(
            tricked(lambda m, x: m.head(m.body(x.view(3, 2, 4)).view(6, 8))),
            "body got an input of shape (3, 2, 4) in a batch of 6 examples: its first axis must be "
            "the batch, or one factor would scale a mix of examples. Expand inputs that are shared "
            "by the batch (such as position embeddings) and keep the batch axis first.",
            id="two examples in one row",
        ),
        pytest.param(
            call_outside,
            "body was called outside its model's forward pass, so it is unknown which examples of "
            "the batch its rows are. Call the whole model, and have its forward return whatever "
            "the loss needs.",
            id="layer called outside the model's forward",
        ),
        pytest.param(backward_twice, TWICE.format(name="head"), id="backward twice"),
        pytest.param(
            input_gradient_first, TWICE.format(name="head"), id="input gradient and backward"
        ),
        pytest.param(
            under_autocast,
            "body computes in torch.bfloat16, and the loss is a mean: it divides every gradient by "
            "the batch's size, which is private, and the quotient is then rounded so coarsely that "
            "one example would change the gradients of all others. Pass criterion= to make_private "
            'and compute the loss with what it returns, or use a sum with loss_reduction="sum".',
            id="autocast",
        ),
        pytest.param(
            tricked(reentrant),
            "body runs for the first time inside the backward pass, where its uses cannot be "
            "counted. Use checkpoint(..., use_reentrant=False).",
            id="reentrant checkpointing",
        ),
    ],
)
@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "hooks only"])
def test_what_bypasses_the_bound_is_refused_on_the_same_batch(
    misbehave: Step, message: str, wrap_model: bool
) -> None:
    private = switchable(wrap_model=wrap_model, lr=1.0)
    train_step(private)
    private.optimizer.zero_grad()
    with pytest.raises(PrivacyViolationError) as refusal:
        misbehave(private)
    assert str(refusal.value) == message
    assert_refused_until_zero_grad(private)


def test_the_mean_of_custom_outputs_is_no_concern_of_a_sum() -> None:
    private = switchable(loss_reduction="sum")
    model_of(private).trick = lambda m, x: Output(m.head(m.body(x)))
    private.model(batch()[0]).logits.sum().backward()
    private.optimizer.step()
    assert private.steps == 1


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda y: (y, None, "text", 3), id="tuple"),
        pytest.param(lambda y: [y], id="list"),
        pytest.param(lambda y: {"logits": y, "loss": None}, id="dict"),
    ],
)
def test_structured_outputs_undo_the_mean_like_a_tensor(wrap: Callable[[Tensor], Any]) -> None:
    plain, nested = switchable(), switchable()
    train_step(plain)
    model_of(nested).trick = lambda m, x: wrap(m.head(torch.relu(m.body(x))))
    output = nested.model(batch()[0])
    leaves = output.values() if isinstance(output, dict) else output
    logits = next(leaf for leaf in leaves if isinstance(leaf, Tensor))
    F.cross_entropy(logits, batch()[1]).backward()
    nested.optimizer.step()
    assert torch.equal(summed(plain), summed(nested))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        pytest.param(
            Convolutional(),
            torch.ones(6),
            "conv got an input of shape (1, 6); with the batch first its rule needs 3 axes. Add "
            "the batch axis.",
            id="conv",
        ),
        pytest.param(
            Switchable(),
            torch.ones(4),
            "body got an input of shape (4,); with the batch first its rule needs 2 or more axes. "
            "Add the batch axis.",
            id="linear",
        ),
    ],
)
def test_an_unbatched_input_is_refused(model: nn.Module, x: Tensor, message: str) -> None:
    private = make_private(model)
    with pytest.raises(PrivacyViolationError) as refusal:
        private.model(x)
    assert str(refusal.value) == message
    with pytest.raises(PrivacyViolationError, match=re.escape(message)):
        private.optimizer.step()


def test_freezing_a_layer_after_make_private_leaves_it_as_it_is() -> None:
    model = Switchable()
    private = make_private(model, noise_multiplier=1.0)
    model.body.requires_grad_(False)
    before = flat(model.body.parameters()), flat(model.head.parameters())
    train_step(private)
    assert torch.equal(flat(model.body.parameters()), before[0])
    assert not torch.equal(flat(model.head.parameters()), before[1])


def test_freezing_between_backward_and_step_releases_no_gradient_without_noise() -> None:
    silent, private = switchable(lr=1.0), switchable(lr=1.0, noise_multiplier=1.0)
    train_step(silent)
    weight = model_of(private).head.weight
    before = weight.detach().clone()
    backward(private)
    weight.requires_grad_(False)
    private.optimizer.step()
    assert model_of(silent).head.weight.summed_grad.norm() > 0
    assert torch.equal(weight, before)
