"""What ranks must have alike, what they must not, and how long they wait for each other."""

from __future__ import annotations

import gc
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import PrivacyEngine, PrivacyViolationError
from opacus_bpclip.sampling.records import Pass
from tests.ranks.checks import check_seeds
from tests.ranks.models import Private, examples, make_private, wrapped
from tests.ranks.pair import pair
from tests.ranks.test_refusals import told


def made(model: nn.Module, parameters: Any = None, **options: Any) -> Private:
    data = TensorDataset(torch.randn(40, 4), torch.zeros(40, dtype=torch.long))
    engine = PrivacyEngine()
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=0.1)
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=10),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        clipping="backprop",
        **options,
    )
    return Private(engine, private, optimizer, loader)


def ordered(rank: int, wrapper: str, case: str) -> str:
    layers = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model = wrapped(nn.Sequential(*layers), wrapper)
    parameters = list(model.parameters())
    if rank == 1:
        parameters = {"order": parameters[::-1], "fewer": parameters[:1]}[case]
    return told(lambda: made(model, parameters))


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
@pytest.mark.parametrize("case", ["order", "fewer"])
def test_optimizers_with_other_parameters_or_another_order_are_refused(
    wrapper: str, case: str
) -> None:
    one, other = pair().run(ordered, wrapper, case)
    each = {
        "order": "0: ('0.weight', (4, 4), 'torch.float32'), ('1.weight', (4, 4), 'torch.float32')",
        "fewer": "1: ('1.weight', (4, 4), 'torch.float32'), None",
    }[case]
    assert one == other
    assert one == (
        f"ValueError: The ranks differ in the optimizer's parameter {each}. The ranks' sums are "
        "added in the order of the optimizer's parameters. In different orders, the sums of "
        "different parameters would be added, and get the wrong noise. Give the optimizer the same "
        "parameters in the same order on each rank, for example model.parameters(), not a set."
    )


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_no_two_generators_are_seeded_alike(wrapper: str) -> None:
    check_seeds(wrapper)


def patience(rank: int) -> tuple[timedelta, timedelta]:
    groups = (
        dist.distributed_c10d._get_default_group(),
        make_private("DPDDP").optimizer._guard.ranks._group,
    )
    one, other = (g._get_backend(torch.device("cpu")).options._timeout for g in groups)
    return one, other


def test_meetings_wait_as_long_as_the_default_group() -> None:
    for default, own in pair().run(patience):
        assert own == default == timedelta(seconds=150)


class Shifted(nn.Module):
    """Has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.shift)


def buffered(rank: int, broadcast_buffers: bool, wrap_model: bool) -> str | Tensor:
    model = DistributedDataParallel(Shifted(), broadcast_buffers=broadcast_buffers)
    found = []

    def train() -> None:
        private = made(model, wrap_model=wrap_model)
        if not wrap_model:
            private = private._replace(model=model)
        private.step(torch.ones(8, 4), torch.zeros(8, dtype=torch.long), parts=1 + rank)
        found.append(private.values())

    return told(train) or found[0]


def test_a_wrapper_that_waits_for_buffers_may_not_be_called() -> None:
    text = (
        "ValueError: DistributedDataParallel broadcasts rank 0's buffers before each forward "
        "pass, and each rank waits for them. But the ranks' private samples may give them "
        "different numbers of physical batches in a step, and then a rank would wait forever. "
        "Wrap the model with DistributedDataParallel(model, broadcast_buffers=False), or leave "
        "wrap_model=False out."
    )
    assert pair().run(buffered, True, False) == [text] * 2


@pytest.mark.parametrize(("broadcast_buffers", "wrap_model"), [(False, False), (True, True)])
def test_a_model_with_buffers_trains_with_the_remedies(
    broadcast_buffers: bool, wrap_model: bool
) -> None:
    one, other = pair().run(buffered, broadcast_buffers, wrap_model)
    assert torch.equal(one, other)


def left_out(rank: int) -> tuple[list[str], Any]:
    """Pass nothing through the model where the first local batch is empty."""
    private = make_private("FSDP2", lr=0.1)
    errors = []
    for sizes in ((0, 6), (4, 4), (3, 0)):
        private.loader.samples.draw(sizes[rank], Pass())
        try:
            private.optimizer.zero_grad()
            if sizes[rank]:
                private.backward(*examples(sizes[rank], seed=rank))
            private.optimizer.step()
        except PrivacyViolationError as error:
            errors.append(str(error))
            if rank == 1:
                private.optimizer.zero_grad()
                private.optimizer._end_refused_batch(False)
    return errors, (private.values(), private.engine.accountant.history)


def test_a_first_empty_batch_that_is_left_out_is_refused_on_all_ranks() -> None:
    (one, state), (other, others) = pair().run(left_out)
    text = (
        "Rank 0 of 2 takes a step and has not run the model yet. Other ranks' passes wait for its "
        "shards of the parameters, but it does not know how the model is called. Run the model on "
        "each local batch, forward and backward, also on one without rows."
    )
    assert one == [text]
    assert other[0].endswith(f"so no rank takes it: {text}")
    assert state[1] == others[1] == [(0.0, 0.25, 2)]
    assert torch.equal(state[0], others[0])


def groups_left(rank: int) -> list[int]:
    def count() -> int:
        gc.collect()
        return len(dist.distributed_c10d._world.pg_map)

    counts = []
    for _ in range(3):
        private = made(wrapped(nn.Linear(4, 4), "DPDDP"))
        counts.append(count())
        del private
        counts.append(count())  # nothing ends inside the collector
    return counts


def test_a_new_model_ends_the_groups_of_models_that_were_freed() -> None:
    for counts in pair().run(groups_left):
        *_, second, freed, third, last = counts  # the first one may end groups of other tests
        assert second == freed == third == last
