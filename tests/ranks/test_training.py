"""Whole loops over the private loader on two ranks: they stay equal, each item is one rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from opacus_bpclip import PrivacyEngine
from tests.ranks.checks import check_sampling, drawn
from tests.ranks.models import Net, examples, make_private, wrapped
from tests.ranks.pair import RANKS, pair

STEPS = 50


def trained(rank: int, wrapper: str, allocation: str) -> dict[str, Any]:
    private = make_private(
        wrapper,
        data=TensorDataset(*examples(100)),
        batch_size=4,
        lr=0.1,
        noise_multiplier=1.0,
        allocation=allocation,
    )
    begun, sizes = private.values(), []
    for _ in range(STEPS // len(private.loader)):
        with BatchMemoryManager(
            data_loader=private.loader, max_physical_batch_size=2, optimizer=private.optimizer
        ) as loader:
            for x, y in loader:
                sizes.append(len(x))
                private.optimizer.zero_grad()
                private.backward(x, y)
                private.optimizer.step()
    return {
        "begun": begun,
        "values": private.values(),
        "sizes": sizes,
        "history": private.engine.accountant.history,
        "epsilon": private.engine.get_epsilon(1e-5),
    }


@pytest.mark.parametrize(
    ("wrapper", "allocation"), [("DPDDP", "joint"), ("DDP", "equal"), ("FSDP2", "joint")]
)
def test_ranks_stay_equal_over_50_steps_with_empty_and_split_batches(
    wrapper: str, allocation: str
) -> None:
    one, other = pair().run(trained, wrapper, allocation)
    assert one["history"] == other["history"] == [(1.0, 0.04, STEPS)]
    assert one["epsilon"] == other["epsilon"]
    assert torch.equal(one["values"], other["values"])
    assert torch.isfinite(one["values"]).all()
    assert not torch.equal(one["values"], one["begun"])
    for rank in (one, other):
        assert 0 in rank["sizes"]
        assert len(rank["sizes"]) > STEPS
    assert len(one["sizes"]) != len(other["sizes"])


def test_each_item_is_on_one_rank_and_drawn_independently() -> None:
    check_sampling()


def test_the_users_generator_makes_the_samples_repeatable() -> None:
    assert pair().run(drawn, 3) == pair().run(drawn, 3) != pair().run(drawn, 4)


def loader_of_ranks(rank: int) -> tuple[int, float, float]:
    data = TensorDataset(*examples(40))
    sampler = DistributedSampler(data, RANKS, rank)
    engine = make_private("DPDDP").engine
    model = wrapped(Net(), "DPDDP")
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=5, sampler=sampler),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    return len(loader), loader.sample_rate, optimizer.expected_batch_size


def test_a_distributed_sampler_gives_each_rank_its_batch_size() -> None:
    # 20 items a rank, 5 in a batch: a quarter of the data set, 10 examples, in each step.
    assert pair().run(loader_of_ranks) == [(4, 0.25, 5.0)] * RANKS


def resumed(rank: int, folder: str, wrapper: str) -> list[Tensor]:
    path = Path(folder) / (f"{rank}.pt" if wrapper == "FSDP2" else "0.pt")
    saved = make_private(wrapper, lr=0.1, noise_multiplier=1.0)
    batch = examples(6)
    saved.step(*batch)
    if wrapper == "FSDP2" or rank == 0:
        saved.engine.save_checkpoint(path=path, module=saved.model, optimizer=saved.optimizer)
    torch.distributed.barrier()
    loaded = make_private(wrapper, lr=0.1, noise_multiplier=1.0)
    loaded.engine.load_checkpoint(path=path, module=loaded.model, optimizer=loaded.optimizer)
    assert loaded.engine.accountant.history == [(1.0, 0.25, 1)]
    values = loaded.values()
    assert torch.equal(values, saved.values())
    loaded.step(*batch)
    assert loaded.engine.accountant.history == [(1.0, 0.25, 2)]
    return [values, loaded.values()]


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_training_goes_on_from_a_checkpoint(wrapper: str, tmp_path: Path) -> None:
    one, other = pair().run(resumed, str(tmp_path), wrapper)
    assert all(map(torch.equal, one, other))
    assert not torch.equal(*one)


def single(rank: int, folder: str) -> Tensor:
    private = make_private("DPDDP")
    state = torch.load(Path(folder) / "single.pt")
    private.model.load_state_dict(state)
    return private.values()


def test_a_checkpoint_of_one_process_fits_two(tmp_path: Path) -> None:
    private = make_private(lr=0.1)
    private.step(*examples(6))
    torch.save(private.model.state_dict(), tmp_path / "single.pt")
    for values in pair().run(single, str(tmp_path)):
        assert torch.equal(values, private.values())


def back_to_the_best(rank: int, folder: str) -> list[Any]:
    path = Path(folder) / "best.pt"
    private = make_private("DPDDP", lr=0.1, noise_multiplier=1.0)
    private.step(*examples(6))
    if rank == 0:
        private.engine.save_checkpoint(path=path, module=private.model, optimizer=private.optimizer)
    torch.distributed.barrier()
    private.step(*examples(6))
    with pytest.warns(UserWarning, match="lacks 1 steps"):
        private.engine.load_checkpoint(path=path, module=private.model, optimizer=private.optimizer)
    return private.engine.accountant.history


def test_each_rank_counts_the_steps_after_the_best_checkpoint(tmp_path: Path) -> None:
    assert pair().run(back_to_the_best, str(tmp_path)) == [[(1.0, 0.25, 2)]] * RANKS


def drawn_by_one_engine(rank: int, wrapper: str) -> list[list[float]]:
    engine, draws, data = PrivacyEngine(), [], TensorDataset(*examples(40))
    for _ in range(2):
        torch.manual_seed(1)
        model = wrapped(Net(), wrapper)
        _, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=5),
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            clipping="backprop",
        )
        for _ in range(2):
            used = [loader.batch_sampler.generator]
            # Without shards, rank 0 alone draws noise.
            if wrapper == "FSDP2" or rank == 0:
                used.append(optimizer.generator)
            draws += [torch.rand(4, generator=generator).tolist() for generator in used]
            optimizer._renew()
    return draws


@pytest.mark.parametrize(("wrapper", "generators"), [("DPDDP", 8 + 4), ("FSDP2", 2 * 8)])
def test_no_two_generators_of_an_engine_on_two_ranks_draw_the_same(
    wrapper: str, generators: int
) -> None:
    """Also after both were loaded."""
    of_ranks = pair().run(drawn_by_one_engine, wrapper)
    draws = [tuple(numbers) for drawn in of_ranks for numbers in drawn]
    assert len(set(draws)) == len(draws) == generators
