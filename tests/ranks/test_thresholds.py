"""Moving thresholds on two ranks: one count of all examples, the same thresholds everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opacus_bpclip import AdaptiveThreshold
from tests.ranks.models import WRAPPERS, examples, make_private, share
from tests.ranks.pair import pair

SIZES = (7, 5)


def trained(
    rank: int | None, wrapper: str, allocation: str, noise_multiplier: float
) -> tuple[dict[str, float], Tensor]:
    """Take three steps; return the thresholds and the parameters."""
    scaled = {} if allocation == "joint" else {"layer_noise": "dimension"}
    private = make_private(
        wrapper,
        lr=0.1,
        noise_multiplier=noise_multiplier,
        noise_generator=torch.Generator().manual_seed(3),
        allocation=allocation,
        threshold=AdaptiveThreshold(),
        **scaled,
    )
    for seed in (5, 6, 7):
        batch = examples(12, seed)
        private.step(*(batch if rank is None else share(batch, rank, SIZES)))
    return dict(private.optimizer.thresholds), private.values()


@pytest.mark.parametrize("allocation", ["joint", "equal"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_thresholds_follow_the_union_of_the_ranks_batches(wrapper: str, allocation: str) -> None:
    (one, values), (other, _) = pair().run(trained, wrapper, allocation, 0.0)
    alone, expected = trained(None, "", allocation, 0.0)
    assert one == other
    assert set(one.values()) != {0.5}
    assert one == pytest.approx(alone, rel=1e-6)
    assert torch.allclose(values, expected, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_noise_moves_the_thresholds_of_both_ranks_alike(wrapper: str) -> None:
    (one, values), (other, others) = pair().run(trained, wrapper, "equal", 1.0)
    assert one == other
    assert torch.equal(values, others)
    assert one != pair().run(trained, wrapper, "equal", 0.0)[0][0]
