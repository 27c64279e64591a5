"""State that one forward pass leaves for later ones: refused if it holds examples and is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, CoverageError, PrivacyViolationError
from opacus_bpclip.probe.buffers import buffers_of, differing
from tests.budgets import layerwise
from tests.helpers import FEATURES, batch, make_private, model_of, train_step
from tests.joint.helpers import joint
from tests.probing import found, out_of_sight
from tests.stateful import (
    Attribute,
    AttributeWithGradients,
    Backward,
    BackwardHook,
    Bank,
    Cache,
    Counter,
    Delayed,
    Fading,
    GradientOnly,
    Hidden,
    Lagged,
    Late,
    LateAttribute,
    Masks,
    Pair,
    Rare,
    Rebound,
    Remembering,
    Running,
    Seen,
    Sixth,
    Sparse,
    Weighted,
    WithGradients,
)

BOTH = pytest.mark.parametrize("backprop", [joint(), layerwise()], ids=["joint", "each"])
CARRIED = (
    "The model keeps something of its examples in {}, and later forward passes depend on it: on "
    "made-up examples their outputs or gradients changed with the examples of an earlier batch. An "
    "example would change the contributions of batches in which it is not, and the noise is not "
    "made for that. Statistics of earlier batches, memory banks and hidden states that go on must "
    "stay out: begin each forward pass without them (zeros, a trained parameter, numbers from "
    "public data), or keep their module from updating them (evaluation mode). A counter of steps "
    "may stay in a buffer, but no count of examples."
)


@BOTH
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "not persistent"])
@pytest.mark.parametrize("make", [Lagged, Bank, Hidden])
def test_what_is_carried_to_later_batches_is_refused_before_training(
    make: Callable[[bool], Remembering], persistent: bool, backprop: BackpropClipping
) -> None:
    with pytest.raises(CoverageError) as refusal:
        make_private(make(persistent), backprop=backprop)
    assert str(refusal.value) == CARRIED.format("the buffer kept")


@BOTH
def test_physical_batches_are_refused_as_whole_ones(backprop: BackpropClipping) -> None:
    with pytest.raises(CoverageError) as refusal:
        make_private(Lagged(), backprop=backprop, physical_batch_size=2)
    assert str(refusal.value) == CARRIED.format("the buffer kept")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Rebound, id="a new tensor each time"),
        pytest.param(Delayed, id="read two passes later"),
        pytest.param(Late, id="written from the second pass on"),
        pytest.param(GradientOnly, id="only the gradient changes"),
        pytest.param(WithGradients, id="written only where gradients are made"),
        pytest.param(Sixth, id="read from the sixth pass on"),
        pytest.param(Backward, id="written in the backward pass"),
        pytest.param(Rare, id="written by chance"),
        pytest.param(Fading, id="hardly any of it is kept"),
        pytest.param(lambda: Seen(read=True), id="the number of examples"),
    ],
)
def test_no_way_of_keeping_it_hides_it(make: Callable[[], Remembering]) -> None:
    assert found(make()) == CARRIED.format("the buffer kept")


def test_an_attribute_that_only_later_passes_use_is_found() -> None:
    assert found(LateAttribute()) == CARRIED.format("an attribute or a global variable")


@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(lambda self, mean: setattr(self, "last", mean), id="a new tensor"),
        pytest.param(lambda self, mean: self.last.copy_(mean), id="in place"),
        pytest.param(lambda self, mean: self.last.data.copy_(mean), id="in place unnoticed"),
    ],
)
def test_an_attribute_that_is_written_only_where_gradients_are_made_is_found(hold: Any) -> None:
    assert found(AttributeWithGradients(hold)) == CARRIED.format(
        "an attribute or a global variable"
    )


def test_an_attribute_that_is_written_by_a_hook_on_a_gradient_is_found() -> None:
    assert found(BackwardHook()) == CARRIED.format("an attribute or a global variable")


@pytest.mark.parametrize("place", ["an object of an object", "a class", "a global"])
def test_state_out_of_sight_that_is_written_only_where_gradients_are_made_is_found(
    place: str,
) -> None:
    # 12.9 times the claim, by an example of the step before.
    assert found(out_of_sight(place)) == CARRIED.format("an attribute or a global variable")


def test_a_counter_of_passes_with_gradients_is_not_called_an_example() -> None:
    def count(model: Any, _: Tensor) -> None:
        model.last = model.last + 1

    text = found(AttributeWithGradients(count)) or ""
    assert text.startswith("The model returned other numbers when it was run on the same batch")


def test_an_array_that_is_written_only_where_gradients_are_made_is_found() -> None:
    model = AttributeWithGradients(lambda self, mean: np.copyto(self.array, mean.numpy()))
    model.array = np.zeros(FEATURES)
    model.layer.register_forward_pre_hook(lambda _, args: args[0] + torch.from_numpy(model.array))
    assert found(model) == CARRIED.format("an attribute or a global variable")


def test_all_buffers_that_hold_examples_are_named_and_their_module() -> None:
    private = "The model keeps something of its examples in the buffer one.kept, other.kept, and"
    assert (found(Pair()) or "").startswith(private)


@BOTH
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Counter, id="a counter that outputs depend on"),
        pytest.param(Cache, id="a table that grows with the length"),
        pytest.param(Masks, id="a mask that grows with the batch"),
        pytest.param(lambda: Running(persistent=False), id="statistics that are never read"),
        pytest.param(lambda: Seen(read=False), id="a number of examples that is never read"),
        pytest.param(Sparse, id="a sparse matrix and a counter"),
    ],
)
def test_what_holds_no_examples_or_is_never_read_is_accepted(
    make: Callable[[], nn.Module], backprop: BackpropClipping
) -> None:
    private = make_private(make(), backprop=backprop)
    train_step(private)
    train_step(private)
    assert private.steps == 2


def test_persistent_buffers_that_are_never_read_stay_refused() -> None:
    assert found(Running(persistent=True)) == (
        "The buffer kept stores values computed from the batch, without noise: the trained model "
        "would contain private data. Keep its module from updating it (evaluation mode, frozen "
        "statistics). Later outputs and gradients did not depend on it: if you only watch it, "
        "register it with persistent=False, and keep it out of all that you publish."
    )


@pytest.mark.parametrize("make", [partial(Seen, False), Masks], ids=["counts", "grows"])
def test_persistent_buffers_that_show_the_number_of_examples_stay_refused(
    make: Callable[..., nn.Module],
) -> None:
    assert found(make(persistent=True)) == (
        "The buffer kept depends on how many examples the batches have (it counts them, or grows "
        "with them), without noise: the trained model would contain private data. Later outputs "
        "and gradients did not depend on it: register it with persistent=False, and keep it out of "
        "all that you publish."
    )
    assert found(make(persistent=False)) is None


@pytest.mark.parametrize("make", [Lagged, Bank, Hidden, Running])
def test_a_module_that_does_not_update_its_state_is_accepted(make: Callable[[], Any]) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), make())
    model[1].eval()
    assert found(model) is None


def test_a_module_that_is_put_in_training_mode_later_is_tried_then() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), Lagged())
    model[1].eval()
    private = make_private(model)
    train_step(private)
    private.model.train()
    with pytest.raises(PrivacyViolationError) as refusal:
        train_step(private)
    assert str(refusal.value) == CARRIED.format("the buffer 1.kept")


def test_state_that_begins_anew_in_each_forward_pass_is_accepted() -> None:
    class Anew(Lagged):
        def forward(self, x: Tensor) -> Tensor:
            self.kept.zero_()
            return super().forward(x)

    assert found(Anew(persistent=False)) is None


def test_a_counter_may_move_from_an_attribute_to_a_buffer() -> None:
    text = found(Attribute()) or ""
    assert text.startswith("The model returned other numbers when it was run on the same batch")
    assert "Keep other state, such as a counter of steps, in a buffer (register_buffer)" in text
    assert found(Counter()) is None


@BOTH
def test_the_first_batch_shows_it_where_the_loader_does_not(backprop: BackpropClipping) -> None:
    private = make_private(Weighted(), backprop=backprop)
    with pytest.raises(PrivacyViolationError) as refusal:
        private.model(batch()[0], weight=torch.ones(6))
    assert str(refusal.value) == CARRIED.format("the buffer kept")
    assert not model_of(private).kept.any()


class Fixed(nn.Module):
    """Has no parameter, keeps the mean of its batch, and reads it in the next pass or does not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("kept", torch.zeros(FEATURES), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        before, self.kept = self.kept, x.detach().mean(dim=0)
        return x - before * (self.kind == "read")


@pytest.mark.parametrize("kind", ["read", "not read"])
def test_a_model_without_gradients_is_judged_by_its_outputs(kind: str) -> None:
    text = CARRIED.format("the buffer kept") if kind == "read" else None
    assert found(Fixed(kind)) == text


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda x: x.to_sparse(), id="sparse"),
        pytest.param(lambda x: x.to_sparse_csr(), id="compressed"),
        pytest.param(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), id="quantized"),
        pytest.param(lambda x: torch.complex(x, -x), id="complex"),
        pytest.param(lambda x: x.long(), id="integers"),
        pytest.param(lambda x: x.bool(), id="flags"),
        pytest.param(lambda x: x[:0], id="empty"),
    ],
)
def test_buffers_of_every_kind_are_compared(kind: Callable[[Tensor], Tensor]) -> None:
    model = nn.Module()
    model.register_buffer("kept", kind(torch.eye(3)))
    one = buffers_of(model, copied=True)
    assert differing(one, buffers_of(model)) == []
    model.kept = kind(torch.diag(torch.tensor([1.0, 0.0, 1.0])))
    assert differing(one, buffers_of(model)) == ["kept"] * bool(len(kind(torch.eye(3))))
    model.kept = None
    assert differing(one, buffers_of(model)) == ["kept"]
