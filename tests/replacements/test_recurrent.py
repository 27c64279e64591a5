"""The replacements of ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` compute the same and train."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from opacus_bpclip import CoverageError, PrivacyEngine, PrivacyViolationError
from opacus_bpclip.model.recurrence import aligns_rows
from opacus_bpclip.replacements import compatible_copy, recurrent
from opacus_bpclip.replacements.base import Copies
from tests.budgets import layerwise
from tests.checks import Trainer, check_training
from tests.strategies import BOUNDS

INPUT, HIDDEN = 3, 4
KINDS = {nn.RNN: recurrent.RNN, nn.LSTM: recurrent.LSTM, nn.GRU: recurrent.GRU}


def network(kind: type[nn.RNNBase], **options) -> nn.RNNBase:
    return kind(INPUT, HIDDEN, dtype=torch.float64, **options)


@st.composite
def calls(draw):
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(list(KINDS)))
    options = {name: draw(st.booleans()) for name in ("bias", "batch_first", "bidirectional")}
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    module = network(kind, num_layers=draw(st.integers(1, 3)), **options)
    batch, steps = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    x = torch.randn(batch, steps, INPUT, dtype=torch.float64)
    shape = (module.num_layers * (1 + module.bidirectional), batch, HIDDEN)
    states = [torch.randn(shape, dtype=torch.float64) for _ in range(1 + (kind is nn.LSTM))]
    lengths = draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch))
    how = draw(st.sampled_from(["batch", "packed", "sorted", "alone"]))
    if how == "alone":
        return module, x[0], [s[:, 0] for s in states], None
    if how == "sorted":
        lengths.sort(reverse=True)
    x = x if module.batch_first else x.transpose(0, 1)
    return module, x, states, None if how == "batch" else (lengths, how == "sorted")


def run(module: nn.Module, x: Tensor, states: list[Tensor], packed) -> tuple:
    """Return outputs and last states, and the gradients of inputs, states and parameters."""
    module.zero_grad()
    x, *states = (each.detach().clone().requires_grad_() for each in (x, *states))
    passed: object = x
    if packed is not None:
        passed = pack_padded_sequence(
            x, torch.tensor(packed[0]), batch_first=module.batch_first, enforce_sorted=packed[1]
        )
    y, last = module(passed, hx=tuple(states) if len(states) > 1 else states[0])
    y = y if packed is None else y.data
    last = last if isinstance(last, tuple) else (last,)
    (y.square().sum() + sum(state.square().sum() for state in last)).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return y, last, x.grad, [state.grad for state in states], gradients


@given(calls())
def test_outputs_states_and_gradients_are_pytorchs(call):
    module, *arguments = call
    made = next(ours for kind, ours in KINDS.items() if isinstance(module, kind)).of(
        module, Copies()
    )
    torch.testing.assert_close(run(made, *arguments), run(module, *arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_initial_state_it_begins_with_zeros(kind):
    module = network(kind, bidirectional=True)
    made, x = compatible_copy(module), torch.randn(2, 3, INPUT, dtype=torch.float64)
    made.flatten_parameters()
    torch.testing.assert_close(made(x), module(x))
    torch.testing.assert_close(made(x[0]), module(x[0]))
    packed = pack_padded_sequence(x, torch.tensor([1, 2, 2]), enforce_sorted=False)
    torch.testing.assert_close(made(packed)[0].data, module(packed)[0].data)


def test_the_state_of_a_packed_batch_has_the_dtype_of_its_inputs():
    """Opacus's is always float32, so half of the digits of a float64 state are gone."""
    made = compatible_copy(network(nn.LSTM))
    packed = pack_padded_sequence(torch.randn(2, 3, INPUT).double(), torch.tensor([2, 2, 1]))
    assert {state.dtype for state in made(packed)[1]} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_between_the_layers_and_nowhere_else(kind):
    torch.manual_seed(0)
    module = network(kind, num_layers=2, dropout=0.9)
    made, x = compatible_copy(module).train(), torch.randn(5, 4, INPUT, dtype=torch.float64)
    assert made.dropout == 0.9
    y, _ = made(x)
    # Of outputs that are dropped out, nine in ten would be zero.
    assert (y != 0).all()
    assert not torch.equal(made(x)[0], y)
    torch.testing.assert_close(made.eval()(x), module.eval()(x))
    made.train().dropout = module.train().dropout = 1.0
    torch.testing.assert_close(made(x), module(x))


@pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last")
def test_the_dropout_of_a_single_layer_does_nothing_as_in_pytorch():
    module = network(nn.LSTM, dropout=0.9).train()
    made, x = compatible_copy(module), torch.randn(5, 4, INPUT, dtype=torch.float64)
    torch.testing.assert_close(made(x), module(x))


def test_what_opacus_makes_of_dropout_is_refused(monkeypatch):
    def of(cls, module, copies):
        made = DPLSTM(INPUT, HIDDEN, num_layers=2, dropout=0.5).double()
        made.load_state_dict(module.state_dict())
        for name in module._parameters:
            made._parameters[name] = made._parameters.pop(name)
        made.forward = lambda x, hx=None: DPLSTM.forward(made, x, hx)
        return made

    monkeypatch.setattr(recurrent.LSTM, "of", classmethod(of))
    model = nn.ModuleDict({"body": network(nn.LSTM, num_layers=2, dropout=0.5)})
    with pytest.raises(
        CoverageError, match=r"^body \(LSTM\): its replacement, DPLSTM, is not valid: "
    ):
        compatible_copy(model)


@given(st.sampled_from(list(KINDS)), st.booleans(), st.booleans(), st.integers(1, 2))
@settings(max_examples=20)
def test_state_dicts_load_in_both_directions(kind, bias, bidirectional, layers):
    options = {"bias": bias, "bidirectional": bidirectional, "num_layers": layers}
    one, other = (nn.ModuleDict({"a": network(kind, **options)}) for _ in range(2))
    ours = compatible_copy(one)
    assert list(ours.state_dict()) == list(one.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in one.named_parameters()]
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours.state_dict(), other.state_dict(), rtol=0, atol=0)
    one.load_state_dict(ours.state_dict())
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    ours.load_state_dict(compatible_copy(other).state_dict(), assign=True)
    assert ours["a"].l0.ih.weight is ours["a"].weight_ih_l0


def test_flags_and_modes_are_kept():
    module = nn.GRU(INPUT, HIDDEN, num_layers=2)
    module.weight_hh_l0.requires_grad_(False)
    made = compatible_copy(module.eval())
    assert {n for n, p in made.named_parameters() if not p.requires_grad} == {"weight_hh_l0"}
    assert not made.l0.hh.weight.requires_grad
    assert made.l0.hh.weight is made.weight_hh_l0
    assert not made.training


class Reads(nn.Module):
    """The last state of a network over the steps that an example has, to an answer."""

    def __init__(self, network: nn.Module, *, packed: bool) -> None:
        super().__init__()
        self.network, self.packed = network, packed
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            y, _ = self.network(x if self.network.batch_first else x.transpose(0, 1))
            y = y if self.network.batch_first else y.transpose(0, 1)
            return self.head(y[..., :HIDDEN].sum(dim=1))
        lengths = 1 + (x[:, :, 0] > 0).sum(dim=1).clamp(max=x.shape[1] - 1)
        packed = pack_padded_sequence(
            x, lengths, batch_first=self.network.batch_first, enforce_sorted=False
        )
        last = self.network(packed)[1]
        return self.head((last if isinstance(last, Tensor) else last[0]).sum(dim=0))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_a_replaced_network_stays_within_its_sensitivity(kind, bound, packed):
    torch.manual_seed(0)
    inner = kind(INPUT, HIDDEN, num_layers=2, bidirectional=True, batch_first=True)
    model = PrivacyEngine.get_compatible_module(Reads(inner, packed=packed), clipping="backprop")
    assert aligns_rows(model.network)
    trainer = Trainer(model, (4, INPUT), layerwise(bound=bound), probe=not packed)
    x = torch.randn(4, 4, INPUT, dtype=torch.float64) * 3
    check_training(trainer, x, torch.randn(4, 2, dtype=torch.float64) * 100)


@pytest.mark.parametrize("method", ["forward", "_run"])
def test_a_network_that_runs_differently_gets_no_credit(method):
    model = compatible_copy(Reads(nn.LSTM(INPUT, HIDDEN), packed=False))
    trainer = Trainer(model, (4, INPUT), layerwise())
    setattr(model.network, method, getattr(model.network, method))
    with pytest.raises(PrivacyViolationError, match="network was changed after make_private"):
        trainer.model(torch.randn(2, 4, INPUT, dtype=torch.float64))


class Own(nn.LSTM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Inherits(nn.GRU):
    """Computes what ``nn.GRU`` computes."""


def test_a_subclass_that_changes_nothing_is_replaced():
    assert type(compatible_copy(Inherits(INPUT, HIDDEN))) is recurrent.GRU


@pytest.mark.parametrize(
    ("module", "reason", "remedy"),
    [
        pytest.param(
            nn.LSTM(INPUT, HIDDEN, proj_size=2, batch_first=True),
            "has a proj_size, which is not supported: leave proj_size out, and apply a Linear "
            "layer to its outputs.",
            nn.LSTM(INPUT, HIDDEN, batch_first=True),
            id="projected",
        ),
        pytest.param(
            Own(INPUT, HIDDEN),
            "overrides LSTM.forward, so it is not known what it computes.",
            nn.LSTM(INPUT, HIDDEN),
            id="own forward",
        ),
    ],
)
def test_what_is_not_replaced_is_refused_with_the_reason_and_a_remedy(module, reason, remedy):
    model = nn.ModuleDict({"body": module})
    with pytest.raises(CoverageError) as refusal:
        PrivacyEngine.get_compatible_module(model, clipping="backprop")
    assert f"- body ({type(module).__name__}): no rule bounds the gradient of " in str(
        refusal.value
    )
    assert (
        'PrivacyEngine.get_compatible_module(model, clipping="backprop") does not replace it: it '
        f"{reason}"
    ) in str(refusal.value)
    PrivacyEngine.get_compatible_module(nn.ModuleDict({"body": remedy}), clipping="backprop")
