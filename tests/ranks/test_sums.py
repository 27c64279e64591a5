"""What two ranks release is what one process releases on the union of their batches."""

from __future__ import annotations

import pytest

from tests.ranks.checks import check_union
from tests.ranks.models import WRAPPERS

# How many examples each rank has, and in how many physical batches it trains on them.
SPLITS = {
    "alike": ((6, 6), (1, 1)),
    "other numbers of physical batches": ((4, 8), (1, 4)),
    "nothing on one rank": ((12, 0), (2, 1)),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("allocation", ["joint", "equal"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_released_sum_is_that_of_one_process_on_the_union(
    wrapper: str, allocation: str, split: str
) -> None:
    check_union(wrapper, allocation, *SPLITS[split])
