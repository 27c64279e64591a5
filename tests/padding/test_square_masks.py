"""A mask over pairs of tokens is no row of each example, also where its size is the batch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from tests.helpers import Private, make_private
from tests.padding.training import train

TOKENS = 6
MASK = torch.ones(TOKENS, TOKENS).tril().bool()


class Attention(nn.Module):
    """Attends under a mask of its own, or one that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inside, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("mask", MASK)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        allowed = self.mask if mask is None else mask
        h = self.inside(x)
        scores = (h @ h.transpose(1, 2)).masked_fill(~allowed, -1e9)
        return self.head((scores.softmax(-1) @ h).mean(1))


def _private(rows: int | None) -> Private:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, TOKENS, 4), torch.randint(0, 3, (48,)))
    return make_private(
        Attention(),
        backprop=BackpropClipping(),
        data=data,
        counted=True,
        physical_batch_size=rows,
    )


def test_such_a_mask_is_refused_with_what_to_do() -> None:
    private = _private(TOKENS)
    x, y = next(iter(private.loader))
    with pytest.raises(
        PrivacyViolationError,
        match=r"The argument of shape \(6, 6\) is taken for one row of each example, since it is "
        r"as long as the batch\. If it is the same for all examples \(a mask over pairs of "
        r"tokens\), make it a buffer of the model \(register_buffer\), or expand it to one for "
        r"each example; with physical_batch_size, another size helps, too\.$",
    ):
        train(private, [(x, MASK, y)])
    assert private.steps == 0


@pytest.mark.parametrize("rows", [TOKENS, TOKENS + 1, None])
def test_what_to_do_gives_the_same_sums(rows: int | None) -> None:
    ways = {"buffer": (), "expanded": (MASK,), "passed": (MASK,)}
    if rows == TOKENS:
        del ways["passed"]
    found = []
    for way, mask in ways.items():
        private = _private(rows)
        torch.manual_seed(7)
        batches = list(private.loader)
        if way == "expanded":
            mask = (None,)
        sums = []
        for x, y in batches:
            # A row of padding has no mask, or it would not be zero.
            present = x.flatten(1).any(dim=1)[:, None, None]
            own = (present & MASK,) if way == "expanded" else mask
            sums += train(private, [(x, *own, y)])
        found.append(torch.stack(sums))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
