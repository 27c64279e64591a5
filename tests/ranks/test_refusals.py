"""A refusal on one rank stops all of them, with the reason, and none hangs; then they go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel
from torch.utils.data import TensorDataset

from opacus_bpclip import CoverageError, PrivacyViolationError
from opacus_bpclip.sampling.records import Pass
from tests.ranks.checks import check_leaving, check_refusal, stepped_after
from tests.ranks.models import Net, Private, examples, make_private, share, wrapped
from tests.ranks.pair import pair

Told = list[str]


def told(call: Callable[[], Any]) -> str:
    """Return what a call is refused with."""
    try:
        call()
    except (PrivacyViolationError, ValueError, CoverageError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


OTHERS = "Rank 1 of 2 has refused its part of this step, so no rank takes it: "


@pytest.mark.parametrize("wrapper", ["DPDDP", "DDP"])
@pytest.mark.parametrize("where", ["backward pass", "middle of a batch", "step"])
def test_a_refusal_on_one_rank_stops_both(wrapper: str, where: str) -> None:
    check_refusal(wrapper, where)


def test_a_refusal_at_the_step_of_one_rank_stops_both_with_shards() -> None:
    check_refusal("FSDP2", "step")


def test_a_refusal_that_comes_again_is_told_once() -> None:
    first, second = pair().run(stepped_after, "DPDDP", "backward pass")
    assert first["errors"][0].startswith(OTHERS)
    assert len(first["errors"]) == 1
    # In the backward pass, and again by step().
    assert len(second["errors"]) == 2
    assert second["errors"][1].startswith("The ranks have given up this batch: ")


class Mixing(nn.Module):
    """Couples its examples when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, mix: bool = False) -> Tensor:
        y = self.net(x)
        return y - y.mean(dim=0) if mix else y


def tried_on_one_rank(rank: int, wrapper: str) -> tuple[str, Tensor]:
    torch.manual_seed(1)
    private = make_private(wrapper, model=Mixing(), lr=0.1)
    x, y = share(examples(12), rank, (5, 7))
    private.step(x, y)

    def mixed() -> None:
        private.optimizer.zero_grad()
        private.loader.samples.draw(len(x), Pass())
        loss = nn.functional.cross_entropy(private.model(x, mix=rank == 1), y)
        loss.backward()
        private.optimizer.step()

    error = told(mixed)
    private.optimizer.zero_grad()
    private.step(x, y)
    return error, private.values()


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_a_form_of_call_that_one_rank_alone_has_is_tried_there_and_told(wrapper: str) -> None:
    (one, values), (other, others) = pair().run(tried_on_one_rank, wrapper)
    assert one == f"PrivacyViolationError: {OTHERS}{other.partition(': ')[2]}"
    assert (
        "couples examples: its output for one example changes with the values of the other" in other
    )
    assert torch.equal(values, others)


@pytest.mark.parametrize("where", ["hook", "optimizer"])
@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_a_rank_whose_step_fails_when_the_others_have_taken_it_stops_all(
    wrapper: str, where: str
) -> None:
    one, other = check_leaving(wrapper, where)
    for refused, why in zip(one, other, strict=True):
        assert "RuntimeError: full disk. It came after the ranks had agreed on a step" in why
        assert refused == f"{OTHERS}{why}"


def other_limits(rank: int, wrapper: str) -> tuple[str, list[Any]]:
    private = make_private(wrapper)
    private.optimizer.max_grad_norm = 1.0 + rank
    error = told(lambda: private.step(*share(examples(12), rank, (5, 7))))
    private.optimizer.zero_grad()
    private.optimizer.max_grad_norm = 2.0
    private.step(*share(examples(12), rank, (5, 7)))
    return error, private.engine.accountant.history


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_a_limit_that_one_rank_alone_sets_is_refused(wrapper: str) -> None:
    text = (
        "PrivacyViolationError: The ranks differ in (noise_multiplier, max_grad_norm, batches in "
        "the step, checksum of moving thresholds): rank 0 has (0.0, 1.0, 1, 0), rank 1 has (0.0, "
        "2.0, 1, 0). Their clipped sums have different scales, and one rank's noise would be for "
        "one of them only. Change these numbers on all ranks alike, between the same two steps, "
        "and load a checkpoint on all ranks."
    )
    assert pair().run(other_limits, wrapper) == [(text, [(0.0, 0.25, 1)])] * 2


# Before training: what make_private is called with, on a rank, and what both say.

DIFFER = (
    "ValueError: The ranks differ in {}. The accountant has one entry for all ranks together. Call "
    "make_private with the same model, data set and options on each rank."
)
CALLS: dict[str, tuple[Callable[[int], Any], str]] = {
    "data": (
        lambda rank: make_private("DPDDP", data=TensorDataset(*examples(40 + 4 * rank))),
        "sample_rate: 0.25, 0.2",
    ),
    "items": (
        lambda rank: make_private("DPDDP", data=TensorDataset(*examples(39 + rank))),
        "expected_batch_size: 9.0, 10.0",
    ),
    "noise": (
        lambda rank: make_private("FSDP2", noise_multiplier=1.0 + rank),
        "noise_multiplier: 1.0, 2.0",
    ),
    "options": (
        lambda rank: make_private("DPDDP", bound=("exact", "weighted")[rank]),
        "bound: exact, weighted",
    ),
}


def called(rank: int, name: str) -> tuple[str, str]:
    """Return why a call is refused, and why its repetition as it should be is."""
    call = CALLS[name][0]
    return told(lambda: call(rank)), told(lambda: call(0))


@pytest.mark.parametrize("name", CALLS)
def test_ranks_that_differ_are_refused(name: str) -> None:
    assert pair().run(called, name) == [(DIFFER.format(CALLS[name][1]), "")] * 2


def loaded_on_one_rank(rank: int) -> str:
    model = wrapped(Net(), "DPDDP")
    if rank == 1:
        nn.init.zeros_(model.module.head.bias)
    return told(lambda: remade(model))


def remade(model: nn.Module) -> Private:
    """Make a model private that is wrapped already, or not at all."""
    return make_private("", model=model)


def test_ranks_with_other_parameters_are_refused() -> None:
    one, other = pair().run(loaded_on_one_rank)
    assert one == other
    assert one.startswith("ValueError: The ranks differ in head.bias: (")


class Coupled(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y - y.mean(dim=0)


def coupled_on_one_rank(rank: int, wrapper: str) -> str:
    return told(lambda: make_private(wrapper, model=(Net, Coupled)[rank]()))


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_a_model_that_one_rank_refuses_is_refused_by_both(wrapper: str) -> None:
    one, other = pair().run(coupled_on_one_rank, wrapper)
    assert other.startswith("CoverageError: ")
    assert one == f"CoverageError: Rank 1 of 2 has refused, so no rank trains: {other}"


def half_sharded() -> nn.Module:
    net = Net()
    fully_shard(net.body)
    return net


def sharded_inside() -> nn.Module:
    model = wrapped(Net(), "DPDDP")
    fully_shard(model.module)
    return model


def hybrid() -> nn.Module:
    return fully_shard(Net(), mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("r", "s")))


WRAPPED = {
    "not wrapped": (
        Net,
        "This process is one of 2, and the model was made private for 1: each rank would sample, "
        "add noise and step on its own, and their models would drift apart while the accountant "
        "sees one of them. Wrap the model before make_private: "
        "DifferentiallyPrivateDistributedDataParallel(model) of opacus.distributed, or "
        "fully_shard(model) of torch.distributed.fsdp. Or train in one process (torchrun "
        "--nproc-per-node 1, or no process group).",
    ),
    "half": (
        half_sharded,
        "A part of the model is sharded, but the model itself is not. Call fully_shard on the "
        "parts first, and on the whole model last.",
    ),
    "both": (
        sharded_inside,
        "DifferentiallyPrivateDistributedDataParallel wraps a model that is sharded by "
        "fully_shard. Use one of the two.",
    ),
    "hybrid": (
        hybrid,
        "places is sharded over a mesh of shape (1, 2) in a process group of 2 ranks. Hybrid "
        "sharding and tensor parallelism are not supported. Call fully_shard(model) without a "
        "mesh, which shards over all ranks.",
    ),
    "FSDP1": (
        lambda: FullyShardedDataParallel(Net(), device_id=torch.device("cpu")),
        'FullyShardedDataParallel is not supported with clipping="backprop". Use one process for '
        "each device, with fully_shard(model) of torch.distributed.fsdp, or opacus.distributed's "
        "DifferentiallyPrivateDistributedDataParallel(model).",
    ),
    "one device each": (
        lambda: DataParallel(Net()),
        'DataParallel is not supported with clipping="backprop". Use one process for each device, '
        "with fully_shard(model) of torch.distributed.fsdp, or opacus.distributed's "
        "DifferentiallyPrivateDistributedDataParallel(model).",
    ),
}


def wrapped_like_this(rank: int, name: str) -> str:
    return told(lambda: remade(WRAPPED[name][0]()))


@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_that_is_not_wrapped_as_it_should_be_is_refused(name: str) -> None:
    assert pair().run(wrapped_like_this, name) == [f"ValueError: {WRAPPED[name][1]}"] * 2
