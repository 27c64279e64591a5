"""Scattering features: against their definition in space, image by image, and their invariances."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from opacus_bpclip.ab import models, scattering
from opacus_bpclip.ab.features import featured

HEIGHT, WIDTH = 8, 12


def images(number=3, channels=1):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(number, channels, HEIGHT, WIDTH, generator=generator)


def grid(height, width):
    """Return the places of a window's pixels, as far as it reaches into its repetitions."""
    down = torch.arange(-3 * height, 3 * height, dtype=torch.float64)
    right = torch.arange(-3 * width, 3 * width, dtype=torch.float64)
    return torch.meshgrid(down, right, indexing="ij")


def repeated(window, height, width):
    """Return the sum of a window and its repetitions, ``[height, width]``."""
    return window.unflatten(1, (6, width)).sum(1).unflatten(0, (6, height)).sum(0)


def wavelet(height, width, scale, index):
    down, right = grid(height, width)
    angle, spread = index * math.pi / 8, 0.8 * scale
    along = math.cos(angle) * right + math.sin(angle) * down
    across = math.cos(angle) * down - math.sin(angle) * right
    window = (-(along**2 + (across / 2) ** 2) / (2 * spread**2)).exp()
    window = window / (4 * math.pi * spread**2)
    wave = repeated(window * torch.exp(1j * (3 * math.pi / 4 / scale) * along), height, width)
    window = repeated(window, height, width)
    return wave - wave.sum() / window.sum() * window


def convolved(image, window):
    """Return the circular convolution in space."""
    height, width = image.shape
    return sum(
        value * image.roll((y, x), (0, 1))
        for y, row in enumerate(window.expand(height, width))
        for x, value in enumerate(row)
    )


def mean(image, step=1):
    """Return the local means, at every fourth pixel of what was not padded."""
    known = image[::step, ::step]
    down, right = (step * torch.arange(size, dtype=torch.float64) for size in known.shape)
    means = torch.empty(HEIGHT // 4, WIDTH // 4, dtype=torch.float64)
    for y, x in itertools.product(*map(range, means.shape)):
        away = (down - 4 * (y + 1)).square().unsqueeze(1) + (right - 4 * (x + 1)).square()
        weights = (-away / (2 * 1.6**2)).exp()
        means[y, x] = (weights * known).sum() / weights.sum()
    return means


def by_definition(image):
    """Return the features of one image ``[H, W]``."""
    padded = F.pad(image[None, None].double(), (4,) * 4, mode="reflect")[0, 0]
    fine, coarse = ([wavelet(*padded.shape, scale, own) for own in range(8)] for scale in (1, 2))
    first = [convolved(padded, own).abs() for own in fine]
    first_coarse = [convolved(padded, own).abs() for own in coarse]
    second = [convolved(modulus, own).abs() for modulus in first for own in coarse]
    # The moduli at the coarse scale are known at every other pixel.
    means = [mean(own) for own in (padded, *first)]
    means += [mean(own, step=2) for own in (*first_coarse, *second)]
    maps = torch.stack(means)
    groups = maps.view(27, -1)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()).flatten()


def test_they_are_what_their_definition_says():
    (image,) = images(1)
    expected = by_definition(image[0]).float()
    torch.testing.assert_close(
        scattering.scattering(image[None])[0], expected, rtol=1e-3, atol=1e-3
    )


def test_each_image_has_its_own(monkeypatch):
    together = scattering.scattering(images())
    for image, own in zip(images(), together, strict=True):
        torch.testing.assert_close(scattering.scattering(image[None])[0], own)
    monkeypatch.setattr(scattering, "_AT_A_TIME", 2)
    torch.testing.assert_close(scattering.scattering(images()), together)


def test_each_channel_has_its_own():
    two = images(channels=2)
    parts = [scattering.scattering(two[:, own : own + 1]) for own in range(2)]
    torch.testing.assert_close(scattering.scattering(two), torch.cat(parts, dim=1))


def test_an_image_and_its_mirror_image_are_alike_when_mirrored():
    found = scattering.mirrored(images())
    torch.testing.assert_close(scattering.mirrored(images().flip(-1)), found)
    assert not torch.allclose(
        scattering.scattering(images().flip(-1)), scattering.scattering(images())
    )


def test_a_linear_model_of_mirrored_features_gives_the_mean_of_two_scores():
    model = torch.nn.Linear(scattering.scattering(images(1)).shape[1], 3)
    both = [model(scattering.scattering(own)) for own in (images(), images().flip(-1))]
    torch.testing.assert_close(model(scattering.mirrored(images())), sum(both) / 2)


def test_opponent_colours_tell_brightness_from_colour_and_keep_lengths():
    colours = images(channels=3)
    found = scattering.in_opponent_colours(colours)
    torch.testing.assert_close(found.square().sum(dim=1), colours.square().sum(dim=1))
    grey = scattering.in_opponent_colours(colours[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey[:, 0], 3**0.5 * colours[:, 0])
    torch.testing.assert_close(grey[:, 1:], torch.zeros_like(grey[:, 1:]), rtol=0, atol=1e-6)


def test_contrast_does_not_matter():
    found = scattering.scattering(100 * images())
    torch.testing.assert_close(scattering.scattering(300 * images()), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "parameters", "shape"),
    [
        (models.linear_on_scattering, 39_700, (1, 28, 28)),
        (models.cnn_on_scattering, 84_298, (1, 28, 28)),
        (models.linear_on_cifar10_scattering, 155_530, (3, 32, 32)),
        (models.cnn_on_cifar10_scattering, 179_530, (3, 32, 32)),
    ],
)
def test_the_models_take_them(make, parameters, shape):
    labels = torch.arange(2)
    sets = 2 * (TensorDataset(torch.rand(2, *shape), labels),)
    train, test = featured(sets, scattering.scattering)
    model = make()
    assert models.count_parameters(model) == parameters
    assert model(train.tensors[0]).shape == (2, 10)
    assert torch.equal(test.tensors[1], labels)
