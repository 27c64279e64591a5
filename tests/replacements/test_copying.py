"""``get_compatible_module`` returns a copy of the whole model, and changes nothing but the copy."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from opacus.validators import ModuleValidator, register_module_fixer
from torch import Tensor, nn

from opacus_bpclip import CoverageError, PrivacyEngine
from opacus_bpclip.replacements import compatible_copy
from opacus_bpclip.replacements.attention import MultiheadAttention
from opacus_bpclip.replacements.recurrent import LSTM
from tests.helpers import snapshot


class Shares(nn.Module):
    """One module under two names, in a list, and behind a method."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.again = nn.ModuleDict({"norm": self.norm})
        self.attention = nn.MultiheadAttention(8, 2)
        self.listed = [self.norm, self.attention]
        self.out = self.attention.out_proj
        self.lstm = nn.LSTM(8, 8)
        self.run = self.lstm.forward


def test_one_module_under_several_names_is_replaced_by_one():
    model = Shares()
    made = compatible_copy(model)
    assert type(made.norm) is nn.GroupNorm
    assert made.again["norm"] is made.norm
    assert made.listed == [made.norm, made.attention]
    assert made.out is made.attention.out_proj
    assert made.run.__self__ is made.lstm
    assert isinstance(made.lstm, LSTM)
    assert [type(module) for module in model.modules()] == [type(m) for m in Shares().modules()]


def test_shared_parameters_stay_shared():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    model["head"] = nn.Linear(8, 8)
    model["head"].weight = model["a"].out_proj.weight
    model["norm"], model["other"] = nn.BatchNorm1d(8), nn.LayerNorm(8)
    model["other"].weight = model["norm"].weight
    model["first"], model["second"] = nn.GRU(8, 8), nn.GRU(8, 8)
    model["second"].weight_hh_l0 = model["first"].weight_hh_l0
    made = compatible_copy(model)
    assert made["b"].k_proj.weight is made["a"].k_proj.weight
    assert made["b"].k_proj.bias is not made["a"].k_proj.bias
    assert made["head"].weight is made["a"].out_proj.weight
    assert made["other"].weight is made["norm"].weight
    assert made["second"].l0.hh.weight is made["first"].weight_hh_l0
    assert not {p.data_ptr() for p in made.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shares = Shares()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8)
        self.fixed = nn.BatchNorm2d(8).requires_grad_(False)
        self.register_buffer("table", torch.randn(3))
        self.table.grad = None


def test_model_and_generators_are_afterwards_what_they_were():
    model = Everything()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    generators = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
    compatible_copy(model)
    assert snapshot(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), str(np.random.get_state())) == generators[1:]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "reparametrize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_reparametrized_layers_are_copied(reparametrize):
    model = nn.Sequential(reparametrize(nn.Linear(4, 4)), nn.BatchNorm1d(4)).train()
    model(torch.randn(3, 4))
    before = copy.deepcopy({name: value.clone() for name, value in model.state_dict().items()})
    made = compatible_copy(model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(made[0].eval()(x), model[0].eval()(x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert type(made[1]) is nn.GroupNorm
    # Frozen, they may stay.
    model[0].requires_grad_(False)
    PrivacyEngine.get_compatible_module(model, clipping="backprop")


@pytest.mark.parametrize(("part", "name"), [("", "in_proj_weight"), ("out_proj", "weight")])
def test_a_reparametrized_layer_is_not_replaced(part, name):
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    layer = model["a"].get_submodule(part)
    nn.utils.parametrizations.weight_norm(layer, name)
    with pytest.raises(CoverageError, match=r"it is parametrized .*: remove that first"):
        PrivacyEngine.get_compatible_module(model, clipping="backprop")
    nn.utils.parametrize.remove_parametrizations(layer, name)
    PrivacyEngine.get_compatible_module(model, clipping="backprop")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers_are_copied():
    quantized = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    model = nn.Sequential(quantized, nn.Linear(4, 4), nn.BatchNorm1d(4))
    made, x = compatible_copy(model), torch.randn(2, 4)
    assert torch.equal(made[0](x), model[0](x))


def test_frozen_networks_are_left_alone():
    model = nn.ModuleList([nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)]).requires_grad_(False)
    assert [type(module) for module in compatible_copy(model)] == [nn.LSTM, nn.MultiheadAttention]
    model[1].out_proj.requires_grad_(True)  # which nn.MultiheadAttention uses, and does not call
    assert type(compatible_copy(model)[1]) is MultiheadAttention


def test_a_fixer_of_ones_own_is_used_as_it_is():
    class Odd(nn.BatchNorm1d):
        pass

    class Outer(nn.Sequential):
        pass

    @register_module_fixer(Odd)
    def fix(module: nn.Module) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(module.num_features), nn.Linear(4, 4))

    @register_module_fixer(Outer)
    def unpack(module: nn.Module) -> nn.Module:
        return nn.Sequential(*module)

    try:
        model = Outer(nn.Linear(4, 4), Odd(4), nn.BatchNorm1d(4))
        state = torch.get_rng_state()
        made = compatible_copy(model)
        kinds = [nn.Linear, nn.Sequential, nn.GroupNorm]
        assert type(made) is nn.Sequential
        assert [type(module) for module in made] == kinds
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        del ModuleValidator.FIXERS[Odd], ModuleValidator.FIXERS[Outer]


def test_the_model_itself_may_be_what_is_replaced():
    assert type(compatible_copy(nn.BatchNorm1d(8))) is nn.GroupNorm
    assert isinstance(compatible_copy(nn.MultiheadAttention(4, 2)), MultiheadAttention)


def test_replacing_twice_changes_nothing_more():
    once = compatible_copy(Everything())
    twice = compatible_copy(once)
    assert [type(module) for module in once.modules()] == [type(m) for m in twice.modules()]
    torch.testing.assert_close(once.state_dict(), twice.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda made: setattr(made, "num_heads", 1), id="heads"),
        pytest.param(lambda made: setattr(made, "_mask", lambda *_: None), id="masks"),
        pytest.param(lambda made: setattr(made, "add_zero_attn", True), id="added token"),
        pytest.param(lambda made: made.q_proj.weight.data.add_(1), id="weights"),
    ],
)
def test_a_replacement_that_differs_is_an_error_that_says_where_and_by_how_much(
    break_it, monkeypatch
):
    of = MultiheadAttention.of

    def broken(module: nn.MultiheadAttention, copies: object) -> MultiheadAttention:
        made = of(module, copies)
        break_it(made)
        made.head_dim = made.embed_dim // made.num_heads
        return made

    monkeypatch.setattr(MultiheadAttention, "of", broken)
    model = nn.ModuleDict({"body": nn.TransformerEncoderLayer(4, 2, 4)})
    with pytest.raises(CoverageError) as error:
        PrivacyEngine.get_compatible_module(model, clipping="backprop")
    text = str(error.value)
    place = "body.self_attn (MultiheadAttention): its replacement, MultiheadAttention, "
    assert text.startswith(f"{place}is not valid: ")
    how = ("its outputs differ by ", "its outputs have the shapes ", "weight has another value")
    assert any(part in text for part in how)


def test_what_a_meta_model_becomes_has_no_memory_either():
    with torch.device("meta"):
        model = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.LSTM(4, 4), nn.BatchNorm1d(4)])
    assert all(isinstance(p, Tensor) and p.is_meta for p in compatible_copy(model).parameters())


def test_what_was_replaced_can_be_copied_and_pickled():
    made = compatible_copy(Everything())
    again = (copy.deepcopy(made), pickle.loads(pickle.dumps(made)))
    for other in again:
        torch.testing.assert_close(other.state_dict(), made.state_dict(), rtol=0, atol=0)
        other.load_state_dict(Everything().state_dict(), strict=False)
        assert other.shares.lstm.l0.ih.weight is other.shares.lstm.weight_ih_l0
