"""The models compared: small tanh CNNs, the usual ones of the DP-SGD literature, and linear ones.

They have no normalisation over the batch and no dropout, so that training depends on the initial
weights, the batches and the noise alone.
"""

from __future__ import annotations

from torch import nn


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def digits_cnn() -> nn.Sequential:
    """Return CNN26k scaled down to 8 by 8 images: 9,258 parameters, input [N, 1, 8, 8]."""
    return _two_convolutions(
        nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2), positions=2 * 2
    )


def cnn26k() -> nn.Sequential:
    """Return the CNN of Papernot et al. (arXiv 2007.14191): 26,010 parameters, [N, 1, 28, 28]."""
    return _two_convolutions(
        nn.Conv2d(1, 16, 8, stride=2, padding=2), nn.Conv2d(16, 32, 4, stride=2), positions=4 * 4
    )


def cnn550k() -> nn.Sequential:
    """Return the CIFAR-10 CNN of the same paper: 550,570 parameters, input [N, 3, 32, 32]."""
    return nn.Sequential(
        *_conv_pair(3, 32),
        *_conv_pair(32, 64),
        *_conv_pair(64, 128),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 128),
        nn.Tanh(),
        nn.Linear(128, 10),
    )


def linear_on_hog() -> nn.Linear:
    """Return a linear model of the features of 28 by 28 images: 11,530 parameters, [N, 1152]."""
    return nn.Linear(1152, 10)


def linear_on_cifar10_hog() -> nn.Linear:
    """Return the same for 32 by 32 images: 15,690 parameters, input [N, 1568]."""
    return nn.Linear(1568, 10)


def linear_on_scattering() -> nn.Linear:
    """Return a linear model of 28 by 28 images' scattering: 39,700 parameters, [N, 3969]."""
    return nn.Linear(3969, 10)


def linear_on_cifar10_scattering() -> nn.Linear:
    """Return the same for 32 by 32 images in colour: 155,530 parameters, input [N, 15552]."""
    return nn.Linear(15552, 10)


def cnn_on_scattering() -> nn.Sequential:
    """Return a CNN of 28 by 28 images' scattering: 84,298 parameters, [N, 3969]."""
    return _convolutions_on_maps(81, 7)


def cnn_on_cifar10_scattering() -> nn.Sequential:
    """Return the same for 32 by 32 images in colour: 179,530 parameters, input [N, 15552]."""
    return _convolutions_on_maps(243, 8)


def _convolutions_on_maps(maps: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (maps, size, size)),
        *(nn.Conv2d(maps, 64, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * (size // 4) ** 2, 10)),
    )


def _two_convolutions(first: nn.Conv2d, second: nn.Conv2d, positions: int) -> nn.Sequential:
    return nn.Sequential(
        *(first, nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(second, nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(second.out_channels * positions, 32), nn.Tanh()),
        nn.Linear(32, 10),
    )


def _conv_pair(channels_in: int, channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
    ]
