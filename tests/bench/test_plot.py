"""Growth curves become a picture, and nothing else does."""

import pytest

from opacus_bpclip.bench.plot import draw
from opacus_bpclip.jobs.errors import UsageError
from tests.bench.tiny import CNN, CURVE, record


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_growth_curve(suffix, tmp_path):
    path = tmp_path / f"plot.{suffix}"
    draw(record(CNN, *CURVE), path)
    assert path.stat().st_size > 1000


def test_no_growth_curve(tmp_path):
    with pytest.raises(UsageError, match=r"^--plot needs a growth curve"):
        draw(record(CNN), tmp_path / "plot.png")
