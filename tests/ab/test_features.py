"""Histograms of oriented gradients: against loops, example by example, and their invariances."""

import math

import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_bpclip.ab import features, models


def by_loops(image):
    """Return the features of one image ``[C, H, W]``, as their definition has them."""
    _, height, width = image.shape
    cells = torch.zeros(height // 4, width // 4, 8)
    for y in range(height):
        for x in range(width):
            left, right = image[:, y, max(x - 1, 0)], image[:, y, min(x + 1, width - 1)]
            above, below = image[:, max(y - 1, 0), x], image[:, min(y + 1, height - 1), x]
            across, down = right - left, below - above
            length, channel = torch.hypot(across, down).max(0)
            angle = math.atan2(down[channel], across[channel]) % math.pi
            place = angle / math.pi * 8
            share = place - math.floor(place)
            cells[y // 4, x // 4, math.floor(place) % 8] += (1 - share) * length / 16
            cells[y // 4, x // 4, (math.floor(place) + 1) % 8] += share * length / 16
    blocks = []
    for y in range(height // 4 - 1):
        for x in range(width // 4 - 1):
            block = cells[y : y + 2, x : x + 2].flatten()
            block = (block / (block.norm() + 0.1)).clamp(max=0.2)
            blocks.append((block / (block.norm() + 0.1)).view(2, 2, 8).permute(2, 0, 1).flatten())
    return torch.stack(blocks, dim=1).flatten()


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (1, 12, 8), (3, 8, 16)])
def test_they_are_what_loops_make(channels, height, width):
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([by_loops(image) for image in images])
    torch.testing.assert_close(features.hog(images), expected, rtol=1e-4, atol=1e-5)


def test_each_image_has_its_own(monkeypatch):
    images = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    together = features.hog(images)
    for image, own in zip(images, together, strict=True):
        torch.testing.assert_close(features.hog(image[None])[0], own)
    monkeypatch.setattr(features, "_AT_A_TIME", 2)
    torch.testing.assert_close(features.hog(images), together)


def test_brightness_and_the_sign_of_an_edge_do_not_matter():
    images = torch.rand(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = features.hog(images)
    torch.testing.assert_close(features.hog(images + 5), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(features.hog(-images), expected)
    assert not features.hog(torch.ones(1, 1, 12, 12)).any()


@pytest.mark.parametrize(
    ("make", "shape"),
    [(models.linear_on_hog, (1, 28, 28)), (models.linear_on_cifar10_hog, (3, 32, 32))],
)
def test_the_linear_models_take_them(make, shape):
    labels = torch.arange(2)
    train, test = features.featured(2 * (TensorDataset(torch.rand(2, *shape), labels),))
    assert make()(train.tensors[0]).shape == (2, 10)
    assert torch.equal(test.tensors[1], labels)
