"""The studies' whitened features: what public noise alone decides, for each image by itself."""

import pytest
import torch
from torch.utils.data import TensorDataset

from opacus_bpclip import PinkNoise
from opacus_bpclip.ab import data
from tests.ab.test_augmenting import STUDIES

SIZE = 49


def few(images):
    """Stand for scattering features, which take minutes: 49 pixels, of very unequal sizes."""
    return images.flatten(1)[:, ::16] * torch.linspace(1, 5, SIZE) + 1


def sets(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return tuple(
        TensorDataset(torch.rand(20, 1, 28, 28, generator=own), torch.arange(20))
        for own in generators
    )


@pytest.fixture
def features(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(STUDIES)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    import kept
    import whitened_scattering

    monkeypatch.setattr(whitened_scattering, "scattering", few)
    monkeypatch.setattr(data, "mnist", lambda root: sets(0, 1))
    for own in (whitened_scattering._learnt_from_noise, whitened_scattering.mnist):
        own.cache_clear()
    yield whitened_scattering, kept
    for own in (whitened_scattering._learnt_from_noise, whitened_scattering.mnist):
        own.cache_clear()


def test_the_noises_directions_become_more_equal_at_the_same_mean_square(features):
    studied, _ = features
    noise = PinkNoise((1, 28, 28), count=studied.PICTURES)(step=0)
    plain, whitened = few(noise), studied.whitened(noise)
    before, after = (torch.linalg.eigvalsh(own.T.cov().double()) for own in (plain, whitened))
    torch.testing.assert_close(after.sum(), before.sum(), rtol=1e-3, atol=0)
    damped = before / before.mean() + studied.DAMPING
    expected = before / damped.sqrt()
    torch.testing.assert_close(after / after.sum(), expected / expected.sum(), rtol=1e-3, atol=0)
    assert after.max() / after.min() < 0.5 * before.max() / before.min()
    assert whitened.mean(dim=0).abs().max() < 1e-3


def test_each_image_has_its_own_features(features, tmp_path):
    studied, _ = features
    images = sets(0)[0].tensors[0]
    train, test = studied.mnist(tmp_path)
    torch.testing.assert_close(train.tensors[0][3:4], studied.whitened(images[3:4]))
    assert torch.equal(train.tensors[1], torch.arange(20))
    assert not torch.equal(train.tensors[0], test.tensors[0])


def test_features_are_kept_until_their_code_changes(features, monkeypatch):
    _, kept = features
    made = []

    def make():
        made.append(1)
        return [torch.ones(2)]

    for _ in range(2):
        (found,) = kept.kept("features", make, few)
        assert torch.equal(found, torch.ones(2))
    assert len(made) == 1
    source = kept.inspect.getsource
    monkeypatch.setattr("inspect.getsource", lambda module: source(module) + "# changed")
    kept.kept("features", make, few)
    assert len(made) == 2
