"""Opacus's recurrent networks: all time steps of an example together stay within one limit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.layers.dp_rnn import DPLSTMCell, DPRNNBase, RNNLinear
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from tests.checks import (
    Trainer,
    check_independence,
    check_sensitivity,
    check_silent,
    joint,
    linear_loss,
    squared_loss,
)
from tests.strategies import BOUNDS, MODES, hostile_batches, hostile_examples, scales, seeds

FEATURES, HIDDEN, STEPS = 3, 4, 5


class Reader(nn.Module):
    """A recurrent network and a head on its last output, or on the sum of all of them."""

    def __init__(self, kind: type[DPRNNBase] = DPLSTM, *, packed: bool = False, **options) -> None:
        super().__init__()
        self.rnn = kind(FEATURES, HIDDEN, **{"batch_first": True} | options)
        directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(HIDDEN * directions, 2)
        self.packed = packed
        self.wrap = False

    def forward(self, x: Tensor) -> Tensor:
        if self.wrap:
            return self.head(checkpoint(lambda z: self.rnn(z)[0], x, use_reentrant=False)[:, -1])
        if self.packed:
            # An example's length is its own: where its first feature is last positive.
            steps = torch.arange(1, x.shape[1] + 1)
            lengths = (steps * (x[:, :, 0] > 0)).amax(dim=1).clamp(min=1)
            x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.head(pad_packed_sequence(self.rnn(x)[0], batch_first=True)[0].sum(dim=1))
        if not self.rnn.batch_first:
            x = x.transpose(0, 1)
        y = self.rnn(x)[0]
        return self.head(y[:, -1] if self.rnn.batch_first else y[-1])


@st.composite
def readers(draw):
    torch.manual_seed(draw(seeds))
    return Reader(
        draw(st.sampled_from([DPRNN, DPLSTM, DPGRU])),
        packed=draw(st.booleans()),
        num_layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def neighbours(draw, dtype=torch.float64):
    model = draw(readers())
    bound, upstream = draw(st.sampled_from(MODES))
    trainer = Trainer(
        model,
        (STEPS, FEATURES),
        BackpropClipping(bound=bound, upstream=upstream),
        max_grad_norm=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        reduction=draw(st.sampled_from(["mean", "sum"])),
        dtype=dtype,
    )
    # torch cannot pack an empty batch.
    companions = draw(hostile_batches((STEPS, FEATURES), dtype, min_size=int(model.packed)))
    x = torch.cat([companions, draw(hostile_examples((STEPS, FEATURES), dtype))[None]])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rows = torch.tensor([draw(scales) for _ in range(len(x))], dtype=dtype)
    target = torch.randn(len(x), 2, dtype=dtype, generator=generator) * rows[:, None]
    return trainer, x, target


@given(neighbours())
def test_one_sequence_moves_the_sum_by_at_most_its_sensitivity(case):
    check_sensitivity(*case)


@given(neighbours(dtype=torch.float32))
def test_the_bound_holds_in_float32(case):
    check_sensitivity(*case)


@given(neighbours())
def test_a_sequences_contribution_depends_on_it_alone(case):
    check_independence(*case)


@given(readers(), st.sampled_from(BOUNDS[1:]))
def test_without_clipping_the_sum_is_autograds(model, bound):
    model = model.double()
    x, target = torch.randn(4, STEPS, FEATURES).double(), torch.randn(4, 2).double()
    squared_loss(model(x), target, "sum").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    clipping = BackpropClipping(bound=bound, max_input_norm=None)
    trainer = Trainer(model, (STEPS, FEATURES), clipping, max_grad_norm=1e12, loss=squared_loss)
    trainer.step(x, target)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.summed_grad, expected[name], rtol=1e-9, atol=1e-11)


@given(readers(), st.sampled_from([1e-3, 1e-1, 1e2]))
def test_exact_is_the_sequences_own_gradient_clipped_to_each_layers_limit(model, limit):
    """What goes on to the layers below is unclipped, so plain autograd gives every gradient."""
    model = model.double()
    model.head.requires_grad_(False)
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double()
    clipping = BackpropClipping(bound="exact", max_input_norm=None)
    trainer = Trainer(copy.deepcopy(model), (STEPS, FEATURES), clipping, max_grad_norm=limit)
    released = trainer.released(x, target)
    for name, layer in model.named_modules():
        if not isinstance(layer, RNNLinear):
            continue
        own_limit = trainer.optimizer.layer_sensitivities[name]
        expected = torch.zeros_like(released[name])
        for i in range(len(x)):
            loss = linear_loss(model(x[i : i + 1]), target[i : i + 1], "sum")
            gradient = torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, [*layer.parameters()])]
            )
            expected += gradient * min(1, own_limit / float(gradient.norm() + 1e-300))
        assert torch.allclose(released[name], expected, rtol=1e-6, atol=1e-9 * limit)


class Saturated(nn.Module):
    """Every step's input is at its largest, and every step's upstream gradient points one way."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = DPRNN(1, 1, bias=False, nonlinearity="relu", batch_first=True)
        for parameter in self.rnn.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


def _worst_case(bound, upstream):
    clipping = BackpropClipping(bound=bound, upstream=upstream, max_input_norm=3.0)
    trainer = Trainer(Saturated(), (STEPS, 1), clipping, max_grad_norm=2.0)
    x = torch.full((1, STEPS, 1), 1e4, dtype=torch.float64)
    return trainer, x, torch.full((1, 1), 1e6, dtype=torch.float64)


@pytest.mark.parametrize(("bound", "upstream"), MODES)
def test_one_sequence_reaches_the_bound_of_every_layer(bound, upstream):
    trainer, x, target = _worst_case(bound, upstream)
    released = trainer.released(x, target)
    limits = trainer.optimizer.layer_sensitivities
    assert 0.999 * limits["rnn.l0.ih"] <= released["rnn.l0.ih"].norm() <= limits["rnn.l0.ih"]
    # The first step's state is zero, which only the product bound does not know.
    share = (STEPS - 1) / STEPS if bound == "product" else 1.0
    reached = released["rnn.l0.hh"].norm() / limits["rnn.l0.hh"]
    assert 0.999 * share <= reached <= 1.0


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_sequence_that_is_not_finite_contributes_nothing(bound, packed):
    torch.manual_seed(0)
    trainer = Trainer(Reader(packed=packed), (STEPS, FEATURES), BackpropClipping(bound=bound))
    x, target = torch.randn(4, STEPS, FEATURES).double(), torch.randn(4, 2).double()
    x[-1, 2, 1] = float("nan")
    check_silent(trainer, x, target)


@pytest.mark.parametrize("batch_first", [True, False])
def test_either_layout_of_the_network_gives_the_same(batch_first):
    torch.manual_seed(0)
    reader = Reader(batch_first=True, num_layers=2)
    other = copy.deepcopy(reader)
    other.rnn.batch_first = batch_first
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double() * 100
    sums = [
        joint(Trainer(model, (STEPS, FEATURES), BackpropClipping()).released(x, target))
        for model in (reader, other)
    ]
    assert torch.allclose(*sums, rtol=1e-12)


def test_checkpointing_is_no_second_use():
    torch.manual_seed(0)
    reader = Reader()
    wrapped = copy.deepcopy(reader)
    wrapped.wrap = True
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double() * 100
    sums = [
        joint(Trainer(model, (STEPS, FEATURES), BackpropClipping()).released(x, target))
        for model in (reader, wrapped)
    ]
    assert torch.equal(*sums)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = DPGRU(FEATURES, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1] + self.rnn(x.flip(1))[0][:, -1]


def test_a_network_used_twice_needs_a_declaration():
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, HIDDEN).double() * 100
    with pytest.raises(PrivacyViolationError, match=r"rnn\.l0\.ih is used more than once"):
        Trainer(Twice(), (STEPS, FEATURES), BackpropClipping()).released(x, target)
    uses = {"rnn.l0.ih": 2, "rnn.l0.hh": 2}
    trainer = Trainer(Twice(), (STEPS, FEATURES), BackpropClipping(uses=uses))
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)


class Handmade(nn.Module):
    """Opacus's layers in a loop of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = DPLSTMCell(FEATURES, HIDDEN, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0]


def test_cells_in_a_loop_of_ones_own_are_ordinary_layers_used_once_a_step():
    # Nothing shows that row i is the same example at every step there.
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, HIDDEN).double() * 100
    with pytest.raises(PrivacyViolationError, match=r"cell\.ih is used more than once"):
        Trainer(Handmade(), (STEPS, FEATURES), BackpropClipping()).released(x, target)
    clipping = BackpropClipping(uses={"cell.ih": STEPS, "cell.hh": STEPS})
    check_sensitivity(Trainer(Handmade(), (STEPS, FEATURES), clipping), x, target)


class Shuffling(DPRNN):
    """Feeds the rows of one example to another."""

    def forward_layer(self, x, *args, **kwargs):
        return super().forward_layer(x.roll(1, dims=1), *args, **kwargs)


def test_a_subclass_that_may_move_rows_gets_no_credit_for_alignment():
    trainer = Trainer(Reader(Shuffling), (STEPS, FEATURES), BackpropClipping())
    with pytest.raises(PrivacyViolationError, match=r"rnn\.l0\.ih is used more than once"):
        trainer.released(torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double())


def _patched(model):
    model.rnn.forward_layer = lambda *args, **kwargs: None


def _called_by_its_cell(model):
    model.rnn.l0(torch.randn(3, FEATURES).double())


def _two_axes(model):
    model.rnn(torch.randn(STEPS, FEATURES).double())


def _shared_by_the_batch(model):
    model.rnn(torch.randn(1, STEPS, FEATURES).double())


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (_patched, r"rnn was changed after make_private: nothing shows that its rows are still"),
        (_called_by_its_cell, r"rnn\.l0\.ih was called outside its recurrent network"),
        (_two_axes, r"rnn got an input of shape \(5, 3\); it needs 3 axes, the batch first"),
        (_shared_by_the_batch, r"rnn got an input of shape \(1, 5, 3\) in a batch of 3 examples"),
    ],
    ids=["patched", "cell", "two axes", "shared"],
)
def test_what_hides_which_row_is_whose_is_refused(misuse, message):
    class Misused(Reader):
        def forward(self, x):
            misuse(self)
            return super().forward(x)

    trainer = Trainer(Misused(), (STEPS, FEATURES), BackpropClipping())
    with pytest.raises(PrivacyViolationError, match=message):
        trainer.step(torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double())


def test_a_second_backward_pass_is_refused():
    trainer = Trainer(Reader(), (STEPS, FEATURES), BackpropClipping())
    loss = trainer.model(torch.randn(3, STEPS, FEATURES).double()).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyViolationError, match="backward pass ran twice"):
        loss.backward()


def test_evaluation_clips_the_same_inputs_and_leaves_no_graph_behind():
    trainer = Trainer(Reader(), (STEPS, FEATURES), BackpropClipping(max_input_norm=0.5))
    x = torch.randn(3, STEPS, FEATURES).double() * 10
    trained = trainer.model(x)
    with torch.no_grad():
        assert torch.equal(trainer.model(x), trained)
    assert torch.equal(trainer.model.to_standard_module()(x), trained)


def test_frozen_parts_get_no_hooks():
    reader = Reader(num_layers=2)
    for name, parameter in reader.rnn.named_parameters():
        parameter.requires_grad_("l1" in name)
    trainer = Trainer(reader, (STEPS, FEATURES), BackpropClipping())
    assert set(trainer.optimizer.layer_sensitivities) == {"rnn.l1.ih", "rnn.l1.hh", "head"}
    assert not reader.rnn.l0.ih._forward_hooks
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double() * 100
    check_sensitivity(trainer, x, target)
