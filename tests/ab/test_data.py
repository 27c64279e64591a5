"""Datasets become normalised tensors; what cannot be had is said in one message."""

import importlib.util
import struct
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from opacus_bpclip.ab import data
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.task import task_of
from opacus_bpclip.jobs import extras
from opacus_bpclip.jobs.errors import UsageError


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, images):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(len(images)))


def test_digits_are_split_once_and_for_all():
    first, second = (data.digits() for _ in range(2))
    assert (len(first[0]), len(first[1])) == (1437, 360)
    images, labels = first[0].tensors
    assert images.shape == (1437, 1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(images, second[0].tensors[0])
    shares = torch.bincount(first[1].tensors[1]) / 360
    assert (shares - torch.bincount(labels) / 1437).abs().max() < 0.002


def test_mnist_is_normalised_by_constants(tmp_path):
    pixels = np.stack([np.zeros((28, 28)), np.full((28, 28), 255)])
    write_mnist(tmp_path, pixels)
    images, labels = data.mnist(tmp_path)[1].tensors
    assert images.shape == (2, 1, 28, 28)
    assert images[0, 0, 0, 0].item() == pytest.approx(-0.1307 / 0.3081)
    assert images[1, 0, 0, 0].item() == pytest.approx((1 - 0.1307) / 0.3081)
    assert labels.tolist() == [0, 1]


def test_colour_channels_come_first_and_have_their_own_constants(monkeypatch):
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    pixels[..., 2] = 255
    fake = SimpleNamespace(data=pixels, targets=[3, 7])
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *args, **kwargs: fake)
    images, labels = data.cifar10(Path("data"))[0].tensors
    assert images.shape == (2, 3, 32, 32)
    assert images[0, 0, 0, 0].item() == pytest.approx(-0.4914 / 0.2470)
    assert images[0, 2, 5, 6].item() == pytest.approx((1 - 0.4465) / 0.2616)
    assert labels.tolist() == [3, 7]


def test_absent_data_without_a_network(tmp_path, monkeypatch):
    def refuse(self):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", refuse)
    with pytest.raises(UsageError) as caught:
        data.fashion_mnist(tmp_path)
    assert str(caught.value) == (
        f"FashionMNIST was looked for in {tmp_path}/FashionMNIST/raw, is not there or not readable,"
        " and could not be downloaded (<urlopen error no route to host>). Put "
        "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte there, name the folder "
        "that holds FashionMNIST/raw by --data-root, or, where there is a network, run: "
        'python -c "from torchvision.datasets import FashionMNIST; '
        f"FashionMNIST('{tmp_path}', download=True)\""
    )


def test_damaged_data_is_the_same_error(tmp_path):
    write_mnist(tmp_path, np.zeros((2, 28, 28)))
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"no images")
    with pytest.raises(UsageError, match=r"MNIST was looked for in .* not readable"):
        data.mnist(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "package", "purpose"),
    [("digits", "sklearn", "digits"), ("mnist", "torchvision", "MNIST")],
)
def test_missing_extra(dataset, package, purpose, monkeypatch):
    def find_spec(name):
        return None if name == package else importlib.util.find_spec(name)

    monkeypatch.setattr(extras, "find_spec", find_spec)
    with pytest.raises(UsageError) as caught:
        task_of(Settings(dataset=dataset))
    assert str(caught.value) == (
        f"the dataset {purpose} needs {package}, which is not installed: "
        'pip install "opacus-bpclip[ab]"'
    )
