"""One example more on one rank moves what both release by at most the claim, and by all of it."""

from __future__ import annotations

import pytest

from tests.ranks.checks import check_sensitivity


@pytest.mark.parametrize("wrapper", ["DPDDP", "FSDP2"])
def test_one_example_on_one_rank_moves_the_sum_by_at_most_the_claim(wrapper: str) -> None:
    check_sensitivity(wrapper)
