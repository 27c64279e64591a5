"""Whatever the search runs, the model is afterwards what it was, to the last tensor."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from opacus_bpclip.probe import Batch, UntriedError, count_uses, find_coupling
from opacus_bpclip.probe.copies import Copy
from tests.budgets import layerwise
from tests.helpers import FEATURES, loss_of, make_private
from tests.probing import found, made_up


def anatomy(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """All that can be told of a model and what it holds, in a form that ``==`` compares."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        tensor = value.dequantize() if value.is_quantized else value
        numbers = None if nn.parameter.is_lazy(value) else repr(tensor.detach().tolist())
        flags = value.dtype, value.requires_grad, value.is_leaf and value.grad is None
        return id(value), type(value), flags, sorted(vars(value)), numbers
    if isinstance(value, np.ndarray):
        return id(value), value.tolist()
    if isinstance(value, (torch.Generator, np.random.Generator, random.Random)):
        state = getattr(value, "get_state", getattr(value, "getstate", None))
        return id(value), str(state() if state else value.bit_generator.state)
    if id(value) in seen:
        return id(value)
    seen[id(value)] = value
    if isinstance(value, dict):
        return id(value), [(str(key), anatomy(part, seen)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), type(value), [anatomy(part, seen) for part in value]
    if isinstance(value, nn.Module) or (hasattr(value, "__dict__") and not callable(value)):
        return id(value), type(value), anatomy(vars(value), seen)
    return value


class Twice(nn.Module):
    """One submodule under two names, and one in a list that registers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.second = self.first
        self.hidden = [nn.Linear(FEATURES, FEATURES)]
        self.weights = (self.first.weight, "first")

    def forward(self, x: Tensor) -> Tensor:
        assert self.weights[0] is self.second.weight
        return self.hidden[0](self.second(torch.tanh(self.first(x))))


class Tied(nn.Module):
    """One parameter under two names, one buffer under two names and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.zeros(FEATURES))
        self.a.register_buffer("shift", self.shift)
        self.alias = [self.shift]

    def forward(self, x: Tensor) -> Tensor:
        assert self.a.weight is self.b.weight
        self.shift.add_(1)
        assert self.alias[0] is self.a.shift is self.shift
        return self.b(self.a(x)) + self.shift


class Memory:
    def __init__(self) -> None:
        self.last, self.count, self.log = torch.zeros(1), 0, {"calls": []}


class Forgetful(nn.Module):
    """Rebinds, adds, deletes and works in place on everything it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.calls = nn.Linear(FEATURES, FEATURES), nn.Dropout(), 0
        self.cache, self.memory, self.table = [torch.zeros(2)], Memory(), {"a": torch.ones(2)}
        self.numbers, self.plain, self.old = np.zeros(3), torch.zeros(3), torch.ones(1)
        self.own = (torch.Generator(), np.random.default_rng(1), random.Random(1))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache.append(x)
        self.cache[0].add_(1)
        self.memory.last, self.memory.count = x, self.memory.count + 1
        self.memory.log["calls"].append(x)
        self.table["a"].mul_(2)
        self.table["b"] = x
        self.numbers += 1
        self.plain.add_(1)
        self.extra = x
        if hasattr(self, "old"):
            del self.old
        if not hasattr(self, "late"):
            self.late = nn.Identity()
            self.register_buffer("lazy", torch.zeros(2))
        self.train()
        self.layer.register_forward_hook(lambda *_: None)
        torch.rand(1, generator=self.own[0])
        self.own[1].random()
        self.own[2].random()
        self.layer._parameters["bias"] = self.layer._parameters.pop("bias")
        if self.fails:
            raise KeyError("in mid-run")
        return self.layer(x)


class Bank(nn.Module):
    """A compiled submodule that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES)
        with pytest.warns(FutureWarning, match="jit.script"):
            self.norm = torch.jit.script(nn.BatchNorm1d(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def sequential(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(FEATURES, FEATURES)), nn.Linear(FEATURES, 2))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.LSTM(8, 8))
    model[1].eval()
    return model.requires_grad_(False)


def quantized() -> nn.Module:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.warns(DeprecationWarning, match=r"torch\.ao\.quantization"):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


OLD = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning")
MODELS = [
    pytest.param(Twice, id="one submodule under two names"),
    pytest.param(Tied, id="one parameter under two names"),
    pytest.param(Forgetful, id="attributes"),
    pytest.param(lambda: sequential(parametrizations.weight_norm), id="weight_norm"),
    pytest.param(lambda: sequential(parametrizations.spectral_norm), id="spectral_norm"),
    pytest.param(lambda: sequential(parametrizations.orthogonal), id="orthogonal"),
    pytest.param(lambda: sequential(nn.utils.weight_norm), id="old weight_norm", marks=OLD),
    pytest.param(lambda: sequential(nn.utils.spectral_norm), id="old spectral_norm"),
    pytest.param(frozen, id="frozen"),
    pytest.param(lambda: nn.LSTM(FEATURES, 3), id="LSTM"),
    pytest.param(lambda: DPLSTM(FEATURES, 3), id="DPLSTM"),
    pytest.param(Bank, id="compiled"),
]


@pytest.mark.parametrize("make", MODELS)
def test_a_model_is_afterwards_what_it_was(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(list(model.parameters()) or [torch.zeros(1)])
    batch = made_up(torch.zeros(3, 2, FEATURES))
    if any(isinstance(m, nn.Module) and "Norm1d" in str(m) for m in model.modules()):
        batch = made_up(torch.zeros(3, FEATURES))
    before = anatomy(model), anatomy(optimizer.param_groups)
    output = str(model.state_dict())
    with contextlib.suppress(UntriedError):
        find_coupling(model, batch, loss_reduction="mean")
    assert (anatomy(model), anatomy(optimizer.param_groups)) == before
    assert str(model.state_dict()) == output
    for mine, held in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=False):
        assert held is mine


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_is_run_and_left_as_it_was() -> None:
    model = quantized()
    before = anatomy(model)
    # Dynamic quantization takes its scale from the whole batch.
    assert (found(model) or "").startswith("0 (Linear) couples examples")
    assert anatomy(model) == before


def test_a_model_that_raises_in_mid_run_is_what_it_was() -> None:
    model = Forgetful()
    model.fails = True
    before = anatomy(model)
    with pytest.raises(UntriedError, match=r"^KeyError: 'in mid-run'$"):
        found(model)
    with pytest.raises(UntriedError):
        count_uses(model, made_up(torch.zeros(2, FEATURES)))
    assert anatomy(model) == before


def test_an_interruption_while_tensors_are_replaced_leaves_nothing_behind() -> None:
    model = Twice()
    before = anatomy(model)

    class Interrupted(Copy):
        def _substitute_of(self, tensor: Tensor) -> Tensor:
            if tensor is model.hidden[0].weight:
                raise KeyboardInterrupt
            return super()._substitute_of(tensor)

    with pytest.raises(KeyboardInterrupt), Interrupted(model, double=True):
        pass
    assert anatomy(model) == before


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_power_iteration_takes_up_nothing_of_the_batch(norm: Any) -> None:
    assert found(sequential(norm)) is None


def test_what_a_forward_pass_keeps_for_the_next_one_is_not_hidden() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(FEATURES, 2), None

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            shift = 0 if self.last is None else self.last
            self.last = y.mean()
            return y + shift

    assert (found(Remembering()) or "").startswith(
        ("The model returned other numbers", "(root) (Remembering) couples examples")
    )


def test_a_parameter_without_a_shape_is_named_and_stays_without() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(UntriedError, match=r"^0\.weight has no shape yet: run one batch"):
        find_coupling(model, Batch((torch.zeros(4, 2),), {}, 4, 0), loss_reduction="mean")
    assert nn.parameter.is_lazy(model[0].weight)


def test_a_shared_submodule_trains_after_the_search() -> None:
    model = Twice()
    model.hidden = [nn.Identity()]
    private = make_private(model, backprop=layerwise(uses="auto"))
    assert private.handle._config.uses == {"first": 2}
    loss_of(private.model, torch.randn(6, FEATURES), torch.zeros(6, dtype=torch.long)).backward()
    private.optimizer.step()
    held = private.optimizer.param_groups[0]["params"]
    assert held[0] is model.first.weight is model.second.weight
    assert all(p.dtype == torch.float32 for p in held)


def test_a_model_with_clipping_attached_is_searched_and_left_as_it_was() -> None:
    private = make_private(Tied(), backprop=layerwise(uses="auto", probe=False))
    inner = private.handle._module
    before = anatomy(inner)
    assert find_coupling(inner, made_up(torch.zeros(2, FEATURES)), loss_reduction="mean") is None
    assert anatomy(inner) == before
