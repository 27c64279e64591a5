"""Whitened inputs on two ranks: the same matrices everywhere, and the weights of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opacus_bpclip import InputWhitening
from tests.ranks.models import LENGTH, WORDS, WRAPPERS, examples, make_private, share
from tests.ranks.pair import pair
from tests.whitening.helpers import dense

SIZES = (7, 5)


def public_examples(step: int) -> Tensor:
    return torch.randint(WORDS, (20, LENGTH))


def trained(rank: int | None, wrapper: str, allocation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Take three steps; return a matrix, the parameters, and what the model then computes."""
    torch.manual_seed(rank or 0)  # of no consequence for public examples
    private = make_private(
        wrapper,
        lr=0.1,
        loss_reduction="sum",
        allocation=allocation,
        whitening=InputWhitening(public_examples, power=0.5, every=1),
    )
    for seed in (5, 6, 7):
        batch = examples(12, seed)
        x, y = batch if rank is None else share(batch, rank, SIZES)
        private.step(x, y, scale=len(x))
    with torch.no_grad():
        outputs = private.model(examples(12)[0])
    matrix = dense(private.optimizer._hooks._whitening.layers["head"].matrix)
    return matrix, private.values(), outputs


@pytest.mark.parametrize("allocation", ["joint", "equal"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ranks_whiten_as_one_process_does(wrapper: str, allocation: str) -> None:
    one, other = pair().run(trained, wrapper, allocation)
    assert torch.equal(one[0], other[0])
    expected = trained(None, "", allocation)
    for found, alone in zip(one, expected, strict=True):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
