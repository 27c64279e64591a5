"""Models as people have them on two ranks: shared weights, wrappers of their own, compiled ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from opacus_bpclip import BackpropClipping, PrivacyEngine, PrivacyViolationError
from opacus_bpclip.rules import RULES
from opacus_bpclip.sampling.records import Pass
from tests.joint import compiled
from tests.ranks.checks import step_in_parts
from tests.ranks.models import Net, Private, examples, make_private, share, wrapped
from tests.ranks.pair import pair

SIZES = (5, 7)
BODIES = ("twice", "tied", "broadcast", "slopes", "words", "checkpointed")


def sharded(model: compiled.Model) -> nn.Module:
    """Shard every module by itself, but for what shares a weight."""
    if model.kind == "tied":
        fully_shard([model.first, model.second])
    for part in (model.scaled, model.act, model.words, model.norm, model.head):
        fully_shard(part)
    return fully_shard(model)


def of_body(rank: int, body: str, allocation: str, two: bool) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, compiled.Scaled, compiled.ScaledRule)
        model: nn.Module = compiled.Model(body)
        x, y = compiled.batch_of(12)
        private = make_private(
            model=sharded(model) if two else model,
            data=TensorDataset(*compiled.batch_of(40)),
            lr=0.1,
            max_grad_norm=0.5,
            allocation=allocation,
            uses={"first": 2} if allocation == "equal" else {},
        )
        for _ in range(2):
            private.step(*(share((x, y), rank, SIZES) if two else (x, y)), parts=1 + rank)
        return private.released()


@pytest.mark.parametrize("allocation", ["joint", "equal"])
@pytest.mark.parametrize("body", BODIES)
def test_any_layer_trains_in_shards_of_its_own(body: str, allocation: str) -> None:
    one, other = pair().run(of_body, body, allocation, True)
    assert torch.equal(one, other)
    whole = of_body(0, body, allocation, False)
    torch.testing.assert_close(one, whole, atol=1e-6, rtol=0)


def unwrapped(rank: int, kind: str) -> Tensor:
    """Train by calling the wrapper that the user made."""
    torch.manual_seed(1)
    net = Net()
    if kind == "static":
        model: nn.Module = DistributedDataParallel(net, static_graph=True)
    elif kind == "unused":
        model = DistributedDataParallel(net, find_unused_parameters=True)
    else:
        model = wrapped(net, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine()
    _, private_optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(*examples(40)), batch_size=10),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        clipping="backprop",
        backprop=BackpropClipping(),
        wrap_model=False,
    )
    private = Private(engine, model, private_optimizer, loader)
    for seed in (5, 6, 7):
        private.step(*share(examples(12, seed), rank, SIZES), parts=1 + rank)
    return private.values()


@pytest.mark.parametrize("kind", ["DPDDP", "static", "unused", "FSDP2"])
def test_the_users_own_wrapper_may_be_called(kind: str) -> None:
    one, other = pair().run(unwrapped, kind)
    assert torch.equal(one, other)
    whole = make_private(lr=0.1, max_grad_norm=0.5)
    for seed in (5, 6, 7):
        whole.step(*examples(12, seed))
    torch.testing.assert_close(one, whole.values(), atol=1e-6, rtol=0)


class Ids(Dataset[Any]):
    """Items whose ids start at 3: the made-up ones, 0 and 1, are none."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = examples(1, seed=index)
        return x[0].clamp(min=3), y[0]


class Picky(Net):
    def __init__(self) -> None:
        super().__init__()
        # Functions on parameters are followed only where trials have seen them.
        self.places.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) and x.min() < 3:
            raise ValueError("no such id")
        return super().forward(x)


def picky(rank: int, wrapper: str) -> tuple[Tensor, list[int]]:
    """Meet the first batches, on which the model is tried out, at different times."""
    torch.manual_seed(1)
    private = make_private(wrapper, model=Picky(), data=Ids(), lr=0.1)
    sizes = [(6, 0), (0, 2), (2, 5), (0, 0), (4, 4)]
    for count in sizes:
        x, y = examples(count[rank], seed=rank)
        private.step(x.clamp(min=3), y)
    return private.values(), private.engine.accountant.history


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_ranks_may_meet_their_first_batch_at_different_steps(wrapper: str) -> None:
    (one, history), (other, _) = pair().run(picky, wrapper)
    assert torch.equal(one, other)
    assert history == [(0.0, 0.25, 5)]


def with_criterion(rank: int, wrapper: str) -> Tensor:
    torch.manual_seed(1)
    model = wrapped(Net(), wrapper)
    engine = PrivacyEngine()
    made, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(*examples(40)), batch_size=10),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        clipping="backprop",
    )
    private = Private(engine, made, optimizer, loader)
    x, y = share(examples(12), rank, SIZES) if wrapper else examples(12)
    loader.samples.draw(len(x), Pass())
    parts = 1 + 2 * rank
    for index, (own, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
        optimizer.zero_grad()
        optimizer.signal_skip_step(do_skip=index + 1 < parts)
        criterion(made(own), labels).backward()
        optimizer.step()
    return private.released()


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_a_criterion_serves_ranks_with_other_numbers_of_physical_batches(wrapper: str) -> None:
    one, other = pair().run(with_criterion, wrapper)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, with_criterion(0, ""), atol=1e-6, rtol=0)


def in_bfloat16(rank: int, wrapper: str) -> tuple[Tensor, torch.dtype]:
    """Take a step in bfloat16; return its gradient, and the dtype of the parameters."""
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    low = torch.bfloat16
    if wrapper == "policy":
        model = fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=low))
    else:
        model = wrapped(model.to(low), wrapper)
    x, y = compiled.batch_of(12)
    x = x.to(next(model.parameters()).dtype)
    engine = PrivacyEngine()
    made, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=3),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        loss_reduction="sum",
        clipping="backprop",
    )
    own, labels = share((x, y), rank, SIZES) if wrapper else (x, y)
    loader.samples.draw(len(own), Pass())
    nn.functional.cross_entropy(made(own).float(), labels, reduction="sum").backward()
    optimizer.step()
    private = Private(engine, made, optimizer, loader)
    return private.released(), optimizer.params[0].dtype


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2", "policy"])
def test_sums_in_float32_are_added_up_before_they_are_rounded(wrapper: str) -> None:
    (one, dtype), (other, _) = pair().run(in_bfloat16, wrapper)
    assert dtype == (torch.float32 if wrapper == "policy" else torch.bfloat16)
    assert torch.equal(one, other)
    whole, _ = in_bfloat16(0, "")
    torch.testing.assert_close(one.to(whole.dtype), whole, atol=1e-4, rtol=2**-6)


def compiled_step(rank: int, wrapper: str, allocation: str) -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = TensorDataset(*compiled.batch_of(40))
    private = make_private(wrapper, model=model, data=data, allocation=allocation)
    x, y = compiled.batch_of(12)
    own = share((x, y), rank, (6, 6)) if wrapper else (x, y)
    private.step(*own)
    eager = private.released()
    graph = torch.compile(private.model, backend="aot_eager")
    private.optimizer.zero_grad()
    try:
        private._replace(model=graph).step(*own)
    except PrivacyViolationError as error:
        return str(error)
    finally:
        torch._dynamo.reset()
    return float((private.released() - eager).abs().max())


def test_a_compiled_model_trains_on_two_ranks() -> None:
    assert all(gap < 1e-6 for gap in pair().run(compiled_step, "DPDDP", "joint"))


@pytest.mark.parametrize(
    ("wrapper", "text"),
    [
        (
            "DDP",
            "A graph of torch.compile sends its clipped sums through autograd, where "
            "DistributedDataParallel interferes with them. Wrap the model in opacus.distributed's "
            "DifferentiallyPrivateDistributedDataParallel instead, or train without "
            "torch.compile.",
        ),
        (
            "FSDP2",
            "A graph of torch.compile sends its clipped sums through autograd, where FSDP would "
            "average them. Train without torch.compile, or without fully_shard.",
        ),
    ],
)
def test_compiled_models_in_other_wrappers_are_refused(wrapper: str, text: str) -> None:
    one, other = pair().run(compiled_step, wrapper, "equal")
    assert one == other == text


class Penalised(Net):
    penalty = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.head.weight.square().sum() if self.penalty else y


def penalised(rank: int, where: str, parts: int) -> tuple[list[str], Tensor]:
    """Step with a penalty on a sharded parameter, on rank 1 alone; then step without."""
    torch.manual_seed(1)
    model = Penalised()
    private = make_private("FSDP2", model=model, lr=0.1, probe=False)
    x, y = examples(12, seed=rank)
    private.loader.samples.draw(12, Pass())

    def loss_of(own: Tensor, labels: Tensor, index: int) -> Tensor:
        bad = rank == 1 and index == 0
        model.penalty = bad and where == "the model"
        loss = nn.functional.cross_entropy(private.model(own), labels)
        if bad and where == "the loss":
            (shard,) = (p for p in private.optimizer.params if p.shape == (3, 6))
            loss = loss + (shard * 1.0).to_local().sum()
        return loss

    errors = step_in_parts(private, x, y, parts, loss_of)
    model.penalty = False
    private.step(*examples(5, seed=rank))
    assert private.engine.accountant.history == [(0.0, 0.25, 1)]
    return errors, private.values()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("where", ["the model", "the loss"])
def test_a_refusal_in_the_middle_of_a_pass_over_shards_stops_both(where: str, parts: int) -> None:
    (one, values), (other, others) = pair().run(penalised, where, parts)
    reason = "head.weight got gradient from outside its layer's call, and nothing bounds it. "
    assert one[0].startswith(
        f"Rank 1 of 2 has refused its part of this step, so no rank takes it: {reason}"
    )
    assert reason in other[0]
    assert torch.equal(values, others)
