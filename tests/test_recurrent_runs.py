"""However a recurrent network is run, its rows are known examples, or the run is refused."""

import copy

import pytest
import torch
from opacus.layers import DPGRU, DPRNN
from opacus.layers.dp_rnn import DPLSTMCell
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence, check_sensitivity, joint
from tests.readers import FEATURES, HIDDEN, STEPS, Reader


@pytest.mark.parametrize("batch_first", [True, False])
def test_either_layout_of_the_network_gives_the_same(batch_first):
    torch.manual_seed(0)
    reader = Reader(batch_first=True, num_layers=2)
    other = copy.deepcopy(reader)
    other.rnn.batch_first = batch_first
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double() * 100
    sums = [
        joint(Trainer(model, (STEPS, FEATURES), layerwise()).released(x, target))
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
        joint(Trainer(model, (STEPS, FEATURES), layerwise()).released(x, target))
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
        Trainer(Twice(), (STEPS, FEATURES), layerwise()).released(x, target)
    uses = {"rnn.l0.ih": 2, "rnn.l0.hh": 2}
    trainer = Trainer(Twice(), (STEPS, FEATURES), layerwise(uses=uses))
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
    # There it is not known that row i is the same example at every step.
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, HIDDEN).double() * 100
    with pytest.raises(PrivacyViolationError, match=r"cell\.ih is used more than once"):
        Trainer(Handmade(), (STEPS, FEATURES), layerwise()).released(x, target)
    clipping = layerwise(uses={"cell.ih": STEPS, "cell.hh": STEPS})
    check_sensitivity(Trainer(Handmade(), (STEPS, FEATURES), clipping), x, target)


class Shuffling(DPRNN):
    """Feeds the rows of one example to another."""

    def forward_layer(self, x, *args, **kwargs):
        return super().forward_layer(x.roll(1, dims=1), *args, **kwargs)


def test_a_subclass_that_may_move_rows_gets_no_credit_for_alignment():
    trainer = Trainer(Reader(Shuffling), (STEPS, FEATURES), layerwise())
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
        (
            _patched,
            r"rnn was changed after make_private\. It is not known any more whether its rows",
        ),
        (_called_by_its_cell, r"rnn\.l0\.ih was called outside its recurrent network"),
        (_two_axes, r"rnn got an input of shape \(5, 3\), but needs 3 axes, of which the first"),
        (_shared_by_the_batch, r"rnn got an input of shape \(1, 5, 3\) in a batch of 3 examples"),
    ],
    ids=["patched", "cell", "two axes", "shared"],
)
def test_what_hides_which_row_is_whose_is_refused(misuse, message):
    class Misused(Reader):
        def forward(self, x):
            misuse(self)
            return super().forward(x)

    trainer = Trainer(Misused(), (STEPS, FEATURES), layerwise())
    with pytest.raises(PrivacyViolationError, match=message):
        trainer.step(torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double())


def test_a_second_backward_pass_is_refused():
    trainer = Trainer(Reader(), (STEPS, FEATURES), layerwise())
    loss = trainer.model(torch.randn(3, STEPS, FEATURES).double()).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyViolationError, match="backward pass ran twice"):
        loss.backward()


def test_evaluation_clips_the_same_inputs_and_leaves_no_graph_behind():
    torch.manual_seed(0)
    reader = Reader()
    # A head that is trained scales its output, and its input once it is exported: not to the bit.
    reader.head.requires_grad_(False)
    trainer = Trainer(reader, (STEPS, FEATURES), layerwise(max_input_norm=0.5))
    x = torch.randn(3, STEPS, FEATURES).double() * 10
    trained = trainer.model(x)
    with torch.no_grad():
        assert torch.equal(trainer.model(x), trained)
    torch.testing.assert_close(trainer.model.to_standard_module()(x), trained)


def test_frozen_parts_get_no_hooks():
    reader = Reader(num_layers=2)
    for name, parameter in reader.rnn.named_parameters():
        parameter.requires_grad_("l1" in name)
    trainer = Trainer(reader, (STEPS, FEATURES), layerwise())
    assert set(trainer.optimizer.layer_sensitivities) == {"rnn.l1.ih", "rnn.l1.hh", "head"}
    assert not reader.rnn.l0.ih._forward_hooks
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double() * 100
    check_sensitivity(trainer, x, target)
