"""Seeds that user code sets while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from tests.resuming import Script, check_no_noise_twice, check_no_sample_twice, items


class Seeding(Dataset):
    """Makes each item with random numbers of its own."""

    def __len__(self) -> int:
        return len(items())

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(index)
        x, *others = items()[index]
        return x + torch.randn_like(x), *others


def check_seeds_repeat_nothing(script: Script) -> None:
    for _ in range(4):
        torch.manual_seed(0)
        script.train(1)
    check_no_noise_twice(script)
    check_no_sample_twice(script)


def test_seeds_that_are_set_while_training_repeat_no_noise_and_no_sample() -> None:
    script = Script(data=Seeding()).train(4).train(4)
    check_seeds_repeat_nothing(script)


def test_torchs_own_generator_is_not_used_where_it_is_passed_either() -> None:
    script = Script(generators=[torch.default_generator, torch.default_generator])
    check_seeds_repeat_nothing(script)


def test_other_random_numbers_of_torch_go_on_from_the_seed() -> None:
    drawn = []
    for _ in range(2):
        Script().train()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
