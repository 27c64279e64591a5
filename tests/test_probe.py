"""What the search for coupled examples finds, what it leaves alone, and that it leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from opacus_bpclip import BackpropClipping, CoverageError, PrivacyEngine, PrivacyViolationError
from opacus_bpclip.probe import Batch, UntriedError, find_coupling
from opacus_bpclip.probe import coupling as search
from opacus_bpclip.probe.batches import made_up_batches
from tests.helpers import CLASSES, FEATURES, batch, loss_of, make_private, mlp, summed
from tests.strategies import LayerCase, architectures


def made_up(*args: Any, axis: int = 0, **kwargs: Any) -> Batch:
    first = next(iter((*args, *kwargs.values())))
    size = int(first.batch_sizes[0]) if isinstance(first, PackedSequence) else first.shape[axis]
    return Batch(args, kwargs, size, axis).invent(4)


def found(model: nn.Module, batch: Batch | None = None, loss_reduction: str = "mean") -> str | None:
    batch = batch or made_up(torch.zeros(2, FEATURES))
    problem = find_coupling(model, batch, loss_reduction=loss_reduction)
    return None if problem is None else problem.text


class Middle(nn.Module):
    """Does something between two layers."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.head(self.function(self.body(x)))


class Returning(Middle):
    """Does something to the output."""

    def forward(self, x: Tensor) -> Any:
        return self.function(self.head(self.body(x)))


# What is found


@pytest.mark.parametrize("strength", [1.0, 1e-3, 1e-6, 1e-9, 1e-12])
def test_weak_coupling_is_found(strength: float) -> None:
    assert "couples examples" in (found(Middle(lambda h: h + strength * h.mean(dim=0))) or "")


class Single(nn.Module):
    """Insists on float32, as code with a dtype of its own does."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.body = nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        assert h.dtype == torch.float32
        return h + self.strength * h.mean(dim=0)


@pytest.mark.parametrize(("strength", "coupled"), [(1e-2, True), (1e-3, True), (0.0, False)])
def test_a_model_that_runs_in_single_precision_only_is_searched_there(
    strength: float, coupled: bool
) -> None:
    assert bool(found(Single(strength))) is coupled


def test_a_frozen_backbone_in_half_precision_is_searched_for_what_can_be_seen() -> None:
    class Half(nn.Module):
        def __init__(self, strength: float) -> None:
            super().__init__()
            self.backbone = nn.Linear(FEATURES, 8, dtype=torch.bfloat16).requires_grad_(False)
            self.head, self.strength = nn.Linear(8, CLASSES), strength

        def forward(self, x: Tensor) -> Tensor:
            h = self.backbone(x.to(torch.bfloat16)).to(self.head.weight.dtype)
            return self.head(h + self.strength * h.mean(dim=0))

    torch.manual_seed(0)
    assert found(Half(1.0))
    assert found(Half(0.0)) is None


@pytest.mark.parametrize(
    "couple",
    [
        pytest.param(lambda h: h + h.amax(dim=0), id="largest of the batch"),
        pytest.param(lambda h: h.cumsum(dim=0), id="running sum"),
        pytest.param(lambda h: h.flip(0).cumsum(dim=0).flip(0), id="running sum from the end"),
        pytest.param(lambda h: h + h[:1], id="first example"),
        pytest.param(lambda h: h + h[-1:], id="last example"),
        pytest.param(lambda h: h + h.roll(2, dims=0), id="half a batch away"),
        pytest.param(lambda h: h + h.view(-1, 2, 8).flip(1).view(-1, 8), id="pairs"),
        pytest.param(lambda h: torch.cat([h[:1] + h[1:].sum(dim=0), h[1:]]), id="one row only"),
        pytest.param(lambda h: h * (1 / h.norm()).clamp(max=1.0), id="norm of the batch"),
        pytest.param(lambda h: h + h.sort(dim=0).values, id="sorted batch"),
        pytest.param(lambda h: h + torch.arange(len(h))[:, None], id="place in the batch"),
        pytest.param(lambda h: h / len(h), id="size of the batch"),
        pytest.param(lambda h: h * (len(h) > 2), id="large batches alone"),
        pytest.param(lambda h: h + (h.abs().amax() > 5.0), id="outliers alone"),
        pytest.param(lambda h: h + F.dropout(h, 0.5).mean(dim=0), id="mean after dropout"),
        pytest.param(lambda h: h.lerp(h[torch.randperm(len(h))], 0.2), id="mixup"),
    ],
)
def test_coupling_of_every_kind_is_found(couple: Callable[[Tensor], Tensor]) -> None:
    assert (found(Middle(couple)) or "").startswith("(root) (Middle) couples examples: ")


def test_the_deepest_module_is_named() -> None:
    inner = nn.Sequential(
        nn.Linear(FEATURES, FEATURES), nn.Sequential(Middle(lambda h: h - h.mean(0)))
    )
    assert (found(nn.Sequential(inner, mlp_of(CLASSES))) or "").startswith("0.1.0 (Middle) couples")


def mlp_of(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))


def test_a_head_that_starts_at_zero_hides_nothing() -> None:
    model = Middle(lambda h: h + h.mean(dim=0))
    nn.init.zeros_(model.head.weight)
    assert found(model)


def test_a_gate_that_starts_at_zero_hides_nothing() -> None:
    class Gated(Middle):
        def __init__(self) -> None:
            super().__init__(lambda h: h)
            self.gate = nn.Linear(8, 8)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h + self.gate(h - h.mean(dim=0)))

    assert found(Gated())


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda y: (y, None, "text"), id="tuple"),
        pytest.param(lambda y: {"logits": [y]}, id="nested"),
        pytest.param(lambda y: Output(y), id="dataclass"),
        pytest.param(lambda y: Named(y, 3), id="named tuple"),
        pytest.param(lambda y: Plain(y), id="object"),
    ],
)
@pytest.mark.parametrize("coupled", [True, False])
def test_outputs_of_any_structure_are_looked_into(
    wrap: Callable[[Tensor], Any], coupled: bool
) -> None:
    model = Returning(lambda y: wrap(y - coupled * y.mean(dim=0)))
    assert bool(found(model)) is coupled


@dataclasses.dataclass
class Output:
    logits: Tensor


class Named(NamedTuple):
    logits: Tensor
    number: int


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("returned", ["mean", "sum"])
def test_a_loss_inside_the_model_must_be_what_loss_reduction_says(
    reduction: str, returned: str
) -> None:
    model = Returning(lambda y: getattr(y.square(), returned)())
    problem = found(model, loss_reduction=reduction)
    assert (problem is None) is (reduction == returned)
    if problem:
        assert f"not the {reduction} of what its examples give alone" in problem


def test_what_cannot_be_repeated_is_said_to_be_that() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model = nn.Sequential(nn.Linear(FEATURES, 8), Counting())
    assert (found(model) or "").startswith("The model returned something else when it was run on")


# What is left alone


@pytest.mark.parametrize(
    "own",
    [
        pytest.param(lambda h: F.dropout(h, 0.5), id="dropout"),
        pytest.param(lambda h: h + torch.randn_like(h), id="noise"),
        pytest.param(lambda h: h * torch.empty(len(h), 1).bernoulli_(0.5) / 0.5, id="drop path"),
        pytest.param(lambda h: h + random.random() + np.random.rand(), id="foreign randomness"),
        pytest.param(lambda h: h.relu_(), id="in place"),
        pytest.param(lambda h: h.view(-1, 2).tanh().view(-1, 8), id="flattened and back"),
        pytest.param(lambda h: h.T.contiguous().T, id="batch second for a while"),
        pytest.param(
            lambda h: (h[h.sum(1).argsort()], h.sum(1).argsort().argsort())[0][
                h.sum(1).argsort().argsort()
            ],
            id="sorted and unsorted",
        ),
        pytest.param(lambda h: h / h.norm(dim=1, keepdim=True), id="own norm"),
    ],
)
def test_what_each_example_does_alone_is_no_coupling(own: Callable[[Tensor], Tensor]) -> None:
    assert found(Middle(own)) is None


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param(lambda y: y.unsqueeze(1).expand(-1, 5, -1).flatten(0, 1), id="batch major"),
        pytest.param(lambda y: y.unsqueeze(0).expand(5, -1, -1).flatten(0, 1), id="time major"),
        pytest.param(lambda y: y.T, id="batch second"),
        pytest.param(lambda y: (y, torch.ones(3)), id="a constant beside"),
        pytest.param(lambda y: (y, y.argmax(dim=1)), id="labels beside"),
        pytest.param(lambda y: torch.view_as_complex(torch.stack([y, y], dim=-1)), id="complex"),
        pytest.param(lambda y: y.masked_fill(y > 0, -torch.inf), id="infinite in part"),
    ],
)
def test_the_batch_is_found_wherever_it_is(returned: Callable[[Tensor], Any]) -> None:
    assert found(Returning(returned)) is None


@given(architectures())
def test_no_supported_architecture_is_taken_for_coupled(case: LayerCase) -> None:
    assert found(case.layer, made_up(torch.zeros(2, *case.shape))) is None


@pytest.mark.parametrize("margin", [1, 16])
def test_a_deep_residual_network_is_far_from_the_tolerance(
    margin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(search, "_UNITS", search._UNITS / margin)
    model = PrivacyEngine.get_compatible_module(torchvision.models.resnet18(num_classes=3))
    assert found(model, made_up(torch.zeros(2, 3, 16, 16))) is None


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool = True, coupled: bool = False) -> None:
        super().__init__()
        self.lstm = DPLSTM(FEATURES, 6, batch_first=batch_first)
        self.axis = 0 if batch_first else 1
        self.coupled = coupled

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        y = self.lstm(x)[0]
        if isinstance(y, PackedSequence):
            y = pad_packed_sequence(y, batch_first=True)[0]
        return y - self.coupled * y.mean(dim=self.axis, keepdim=True)


@pytest.mark.parametrize("coupled", [True, False])
def test_the_batch_may_be_second(coupled: bool) -> None:
    model = Recurrent(batch_first=False, coupled=coupled)
    assert bool(found(model, made_up(torch.zeros(5, 2, FEATURES), axis=1))) is coupled


@pytest.mark.parametrize("coupled", [True, False])
def test_packed_sequences_are_made_up_and_taken_apart(coupled: bool) -> None:
    packed = pack_sequence([torch.randn(n, FEATURES) for n in (5, 3, 2)])
    model = Recurrent(coupled=coupled)
    assert bool(found(model, made_up(packed))) is coupled
    assert bool(found(model, Batch((packed,), {}, 3, 0))) is coupled


# What is left behind


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert found(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_in_the_model_leaves_nothing_behind_either() -> None:
    def fail(h: Tensor) -> Tensor:
        raise KeyError("not today")

    model, state = Middle(fail), torch.get_rng_state()
    with pytest.raises(UntriedError, match=r"^KeyError: 'not today'$"):
        found(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# When it runs


class Secret(TensorDataset):
    """Examples whose values nobody may compute with before training."""


def test_made_up_examples_hold_none_of_the_values() -> None:
    seen: list[Tensor] = []
    model = Middle(lambda h: h)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    secret = Secret(torch.full((32, FEATURES), 12345.0), torch.zeros(32, dtype=torch.long))
    make_private(model, data=secret)
    assert seen
    assert all(x.shape[1:] == (FEATURES,) and not (x == 12345.0).any() for x in seen)


def test_training_is_the_same_with_the_search_and_without() -> None:
    gradients = []
    for probe in (True, False):
        torch.manual_seed(3)
        private = make_private(mlp(), backprop=BackpropClipping(probe=probe))
        loss_of(private.model, *batch()).backward()
        private.optimizer.step()
        gradients.append((summed(private), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class TwoInputs(nn.Module):
    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.layer, self.coupled, self.runs = nn.Linear(FEATURES, CLASSES), coupled, 0

    def forward(self, x: Tensor, *, weight: Tensor) -> Tensor:
        self.runs += 1
        y = self.layer(x) * weight[:, None]
        return y - self.coupled * y.mean(dim=0)


def test_what_the_loader_does_not_show_is_searched_on_the_first_batch() -> None:
    private = make_private(TwoInputs(coupled=True))
    with pytest.raises(PrivacyViolationError, match=r"^\(root\) \(TwoInputs\) couples examples"):
        private.model(batch()[0], weight=torch.ones(6))


def test_the_first_batch_is_searched_once() -> None:
    private = make_private(TwoInputs(coupled=False))
    model = private.handle._module
    runs = []
    for size in (0, 6, 5, 1):
        model.runs = 0
        private.optimizer.zero_grad()
        private.model(batch(size)[0], weight=torch.ones(size)).mean().backward()
        private.optimizer.step()
        runs.append(model.runs)
    assert runs[0] > 1
    assert runs[1:] == [1, 1, 1]


class OnlyReal(nn.Module):
    """Runs on what nobody would make up."""

    def __init__(self, coupled: bool) -> None:
        super().__init__()
        self.table, self.coupled = nn.Embedding(8, CLASSES), coupled

    def forward(self, ids: Tensor) -> Tensor:
        y = self.table(ids - 100)
        return y - self.coupled * y.mean(dim=0)


@pytest.mark.parametrize("coupled", [True, False])
def test_examples_that_cannot_be_made_up_are_searched_as_they_are(coupled: bool) -> None:
    ids = torch.arange(100, 108)
    private = make_private(OnlyReal(coupled), data=TensorDataset(ids, ids))
    # One example has no companions: the next batch is looked at.
    private.model(ids[:1])
    if coupled:
        with pytest.raises(PrivacyViolationError, match=r"^\(root\) \(OnlyReal\) couples examples"):
            private.model(ids)
    else:
        private.model(ids).mean().backward()
        private.optimizer.step()
        assert private.steps == 1


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from zip(*batch(), strict=True)


def test_a_stream_shows_no_example_and_waits_for_the_first_batch() -> None:
    assert not list(made_up_batches(DataLoader(Stream(), batch_size=2)))


def test_the_promise_that_nothing_is_coupled_turns_the_search_off() -> None:
    private = make_private(
        Middle(lambda h: h - h.mean(dim=0)), backprop=BackpropClipping(probe=False)
    )
    loss_of(private.model, *batch()).backward()
    with pytest.raises(ValueError, match=r"^Expected probe=1 to be True or False\.$"):
        BackpropClipping(probe=1)


# Uses


class Repeated(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.cell = times, nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.cell(x))
        return self.head(x)


@given(st.integers(1, 5))
def test_uses_are_counted_by_a_dry_run(times: int) -> None:
    private = make_private(Repeated(times), backprop=BackpropClipping(uses="auto"))
    assert private.handle.config.uses == {"cell": times, "head": 1}
    loss_of(private.model, *batch()).backward()
    private.optimizer.step()
    assert summed(private).norm() <= 6 * (1 + 1e-6)


def test_more_uses_than_were_counted_are_refused_on_the_batch() -> None:
    model = Repeated(2)
    private = make_private(model, backprop=BackpropClipping(uses="auto"))
    model.times = 3
    with pytest.raises(PrivacyViolationError, match=r"^cell is used more than 2 times"):
        private.model(batch()[0])


def test_uses_cannot_be_counted_on_examples_that_cannot_be_made_up() -> None:
    ids = torch.arange(100, 108)
    with pytest.raises(CoverageError) as refusal:
        make_private(
            OnlyReal(False), data=TensorDataset(ids, ids), backprop=BackpropClipping(uses="auto")
        )
    assert str(refusal.value).startswith(
        'uses="auto" counts how often each layer is used by running the model on made-up examples '
        "of the data loader's shapes, and that was not possible ("
    )
    assert str(refusal.value).endswith(
        "A count on real examples would not be public. Declare it: BackpropClipping(uses={name: "
        "K})."
    )


def test_the_steps_of_a_recurrent_network_are_no_uses() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 5, FEATURES), torch.zeros(32, dtype=torch.long))
    private = make_private(
        nn.Sequential(Recurrent(), nn.Flatten(), nn.Linear(30, CLASSES)),
        data=data,
        backprop=BackpropClipping(uses="auto"),
    )
    assert set(private.handle.config.uses.values()) == {1}
