"""The noise of two ranks' release is one Gaussian of the claimed scale, however they are seeded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ranks.checks import CLIP, SIGMA, check_noise_law, noises
from tests.ranks.models import examples, make_private, share
from tests.ranks.pair import pair


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_the_law_of_the_noise_on_the_reduced_gradient(wrapper: str) -> None:
    check_noise_law(wrapper)


def released(rank: int, wrapper: str, noise_multiplier: float) -> Tensor:
    private = make_private(wrapper, noise_multiplier=noise_multiplier, max_grad_norm=CLIP)
    private.step(*share(examples(12), rank, (5, 7)))
    return private.released()


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_noise_is_added_to_the_sum_and_is_the_same_on_both_ranks(wrapper: str) -> None:
    noisy, silent = (pair().run(released, wrapper, sigma) for sigma in (SIGMA, 0.0))
    assert torch.equal(*noisy)
    scale = (noisy[0] - silent[0]).std() / (SIGMA * CLIP)
    assert 0.9 < scale < 1.1


def test_a_generator_of_the_users_makes_the_noise_repeatable_and_is_rank_0s() -> None:
    for wrapper in ("DPDDP", "FSDP2"):
        one, again, other = (pair().run(noises, wrapper, 2, seed)[0] for seed in (3, 3, 4))
        assert np.array_equal(one, again)
        assert not np.isclose(one, other).any()
