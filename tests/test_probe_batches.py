"""Batches of every kind are looked into: their examples are found, made up and taken apart."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import CoverageError, PrivacyViolationError
from opacus_bpclip.probe import Batch, batch_leaves, batch_size, find_coupling
from opacus_bpclip.probe.forms import calls, made_up_batches
from opacus_bpclip.probe.leaves import map_leaves
from tests.helpers import CLASSES, FEATURES, make_private

transformers = pytest.importorskip("transformers")


@dataclasses.dataclass
class Data:
    x: Tensor
    name: str = "a"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor


@dataclasses.dataclass
class Derived:
    x: Tensor
    twice: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.twice = self.x * 2


@attrs.define
class Attrs:
    x: Tensor


@attrs.frozen
class FrozenAttrs:
    x: Tensor


class Plain:
    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.itself = self


class Slots:
    __slots__ = ("__hidden", "x")

    def __init__(self, x: Tensor) -> None:
        self.x, self.__hidden = x, x


class Named(NamedTuple):
    x: Tensor
    number: int


class Held:
    def __init__(self, x: Tensor) -> None:
        self.inner = [Data(x)]

    @property
    def x(self) -> Tensor:
        return self.inner[0].x


class Dicts:
    def __init__(self, kind: Callable[[dict], Any]) -> None:
        self.kind = kind

    def __call__(self, x: Tensor) -> Any:
        return self.kind({"x": x})


KINDS: list[Any] = [
    Data,
    Frozen,
    Derived,
    Attrs,
    FrozenAttrs,
    Plain,
    Slots,
    Held,
    lambda x: Named(x, 3),
    lambda x: [x],
    lambda x: deque([x]),
    Dicts(dict),
    Dicts(UserDict),
    Dicts(OrderedDict),
    Dicts(transformers.BatchEncoding),
    Dicts(lambda d: transformers.utils.ModelOutput(**d)),
]
IDS = [getattr(kind, "__name__", str(i)) for i, kind in enumerate(KINDS)]


def x_of(value: Any) -> Tensor:
    if isinstance(value, (list, deque)):
        return value[0]
    return value.x if hasattr(value, "x") else value["x"]


class Reading(nn.Module):
    def __init__(self, coupled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.coupled = nn.Linear(FEATURES, CLASSES), coupled

    def forward(self, batch: Any) -> Tensor:
        y = self.layer(x_of(batch))
        return y - self.coupled * y.mean(dim=0)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_batch_of_any_kind_is_found_and_made_up(kind: Callable[[Tensor], Any]) -> None:
    x = torch.full((6, FEATURES), 7.0)
    value = kind(x)
    assert batch_size((value,), {}, 0) == 6
    batch = Batch((value,), {}, 6, 0)
    made = batch.invent(4)
    assert type(made.args[0]) is type(value)
    assert x_of(made.args[0]).shape == (4, FEATURES)
    assert not bool((x_of(made.args[0]) == 7).any())
    assert x_of(value) is x  # as it was
    assert x_of(made.select([1, 2]).args[0]).shape == (2, FEATURES)
    assert x_of(made.to(torch.device("cpu"), torch.float64).args[0]).dtype == torch.float64
    swapped = x_of(made.swapped([0], seed=3).args[0])
    assert (swapped == x_of(made.args[0])).all(dim=1).tolist() == [True, False, False, False]
    assert batch.signature == made.signature
    assert batch.signature == Batch((kind(x[:2]),), {}, 2, 0).signature
    assert batch.signature != Batch((kind(x.long()),), {}, 6, 0).signature


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_batch_of_any_kind_is_searched_and_trained_on(
    kind: Callable[[Tensor], Any], coupled: bool
) -> None:
    x = torch.randn(6, FEATURES)
    problem = find_coupling(
        Reading(coupled), Batch((kind(x),), {}, 6, 0).invent(4), loss_reduction="mean"
    )
    assert bool(problem) is coupled
    # What the loader shows is a tensor, so the first batch is what is searched.
    private = make_private(Reading(coupled), data=TensorDataset(torch.zeros(32)))
    if coupled:
        with pytest.raises(PrivacyViolationError, match="couples examples"):
            private.model(kind(x))
    else:
        private.model(kind(x)).mean().backward()
        private.optimizer.step()
        assert private.steps == 1


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_collate_function_may_return_any_kind(kind: Callable[[Tensor], Any]) -> None:
    data = TensorDataset(torch.randn(8, FEATURES))
    loader = DataLoader(
        data, batch_size=2, collate_fn=lambda items: kind(torch.stack([x for (x,) in items]))
    )
    found = [batch.args for batch in made_up_batches(loader, Reading())]
    assert any(args and type(args[0]) is type(kind(torch.zeros(4, 1))) for args in found)


def test_what_is_passed_twice_is_changed_once() -> None:
    x = torch.zeros(6, 2)
    made = Batch((x, [x]), {"again": Data(x)}, 6, 0).invent(4)
    assert made.args[0] is made.args[1][0] is made.kwargs["again"].x


def test_an_object_that_holds_itself_is_copied_with_that() -> None:
    value = Plain(torch.zeros(6, 2))
    made = Batch((value,), {}, 6, 0).invent(4).args[0]
    assert made.itself is made is not value


def test_what_holds_nothing_that_changed_stays_the_same_object() -> None:
    value = [Data(torch.zeros(2)), {"a": (1, "b")}]
    assert map_leaves(value, lambda leaf: leaf) is value


def test_nothing_is_changed_in_what_is_no_part_of_a_batch() -> None:
    model = nn.Linear(2, 2)
    assert list(batch_leaves([model, nn.Linear, len, torch.float32])) == [
        model,
        nn.Linear,
        len,
        torch.float32,
    ]


def test_the_size_of_a_batch_is_that_of_the_first_tensor_with_such_an_axis() -> None:
    packed = pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    assert batch_size((3, torch.zeros(()), torch.zeros(5, 2)), {}, 0) == 5
    assert batch_size((torch.zeros(5), torch.zeros(4, 3)), {}, 1) == 3
    assert batch_size(((packed,),), {}, 0) == 2
    assert batch_size((), {"a": Plain(torch.zeros(7))}, 0) == 7
    assert batch_size((torch.zeros(()), "text"), {"a": None}, 0) is None


def test_texts_of_the_examples_do_not_tell_calls_apart() -> None:
    one = Batch((torch.zeros(2, 1), ["a", "b"]), {"mode": "x"}, 2, 0)
    other = Batch((torch.zeros(3, 1), ["c", "d", "e"]), {"mode": "x"}, 3, 0)
    assert one.signature == other.signature
    assert one.signature != one._replace(kwargs={"mode": "y"}).signature
    assert one.signature != one._replace(args=(torch.zeros(2, 1), [torch.zeros(2)])).signature


def test_a_batch_without_a_tensor_is_refused_as_before() -> None:
    private = make_private(Reading())
    with pytest.raises(CoverageError, match="contain no tensor with a batch axis"):
        private.model(Data("x"))


X, Y, Z = torch.zeros(4, 1), torch.zeros(4, 2), torch.zeros(4, 3)


def forms(forward: Any, collated: Any) -> list[Any]:
    model = nn.Module()
    model.forward = forward
    return [args or kwargs for args, kwargs in calls(collated, model)]


def same(one: Any, other: Any) -> bool:
    return str(one) == str(other)


@pytest.mark.parametrize(
    ("forward", "collated", "expected"),
    [
        (lambda x: x, (X, Y), [(X,), ((X, Y),)]),
        (lambda a, b: a, (X, Y, Z), [(X, Y)]),
        (lambda a, b, c: a, [X, Y, Z], [(X, Y, Z)]),
        (lambda x, mask=None: x, (X, Y), [(X,), (X, Y), ((X, Y),)]),
        (lambda a, b: a, ((X, Y), Z), [((X, Y), Z), (X, Y)]),
        (lambda x: x, X, [(X,)]),
        (lambda x: x, Named(X, 1), [(Named(X, 1),), (X,), (Named(X, 1),)]),
        (lambda x: x, {"x": X, "y": Y}, [{"x": X}, ({"x": X, "y": Y},)]),
        (lambda x, y: x, {"x": X, "y": Y}, [{"x": X, "y": Y}]),
        (lambda **k: k, {"x": X, "y": Y}, [{"x": X, "y": Y}]),
        (lambda x: x, UserDict(x=X), [{"x": X}, (UserDict(x=X),)]),
    ],
)
def test_a_model_is_called_in_the_forms_that_its_signature_allows(
    forward: Any, collated: Any, expected: list[Any]
) -> None:
    assert same(forms(forward, collated), expected)
