"""What the tests of comparisons share."""

import functools

import pytest
from opacus.accountants.utils import get_noise_multiplier

from opacus_bpclip.ab import privacy

SEARCHED = functools.cache(get_noise_multiplier)


@pytest.fixture(autouse=True)
def _searched_once(monkeypatch):
    """The search for the noise takes longer than all training here, and is always the same."""
    monkeypatch.setattr(privacy, "get_noise_multiplier", SEARCHED)
