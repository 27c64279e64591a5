"""The models have the sizes that the literature reports, and fit their datasets."""

import pytest
import torch

from opacus_bpclip.ab.models import count_parameters
from opacus_bpclip.ab.settings import DATASETS
from opacus_bpclip.jobs.loading import made_by


@pytest.mark.parametrize(
    ("dataset", "parameters", "shape"),
    [
        ("digits", 9_258, (1, 8, 8)),
        ("mnist", 26_010, (1, 28, 28)),
        ("fashion-mnist", 26_010, (1, 28, 28)),
        ("cifar10", 550_570, (3, 32, 32)),
    ],
)
def test_size_and_shapes(dataset, parameters, shape):
    model = made_by(DATASETS[dataset].model, torch.nn.Module)
    assert count_parameters(model) == parameters
    assert model(torch.zeros(2, *shape)).shape == (2, 10)
