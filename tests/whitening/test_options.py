"""Options and public examples that are refused, and `PinkNoise`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from opacus_bpclip import BackpropClipHooks, BackpropClipping, InputWhitening, PinkNoise
from tests.checks import Trainer
from tests.whitening.helpers import SHAPE


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        (
            lambda _: torch.ones(3, 5),
            r"on the public examples of InputWhitening: RuntimeError: mat1",
        ),
        (lambda _: 1 / 0, r"ZeroDivisionError: division by zero\. Its probes must return what the"),
    ],
)
def test_probes_that_do_not_fit_are_refused_and_the_model_is_left_unchanged(
    probes: object, said: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    before = copy.deepcopy(vars(model[0])["_forward_hooks"])
    clipping = BackpropClipping(whitening=InputWhitening(probes), max_input_norm=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=said):
        Trainer(model, (4,), clipping)
    assert vars(model[0])["_forward_hooks"] == before
    Trainer(model, (4,), BackpropClipping())


def test_whitening_that_does_nothing_is_refused() -> None:
    for model, public, said in (
        (nn.LayerNorm(4), torch.ones(3, 4), r"finds no layer to whiten: .* or leave out whitening"),
        (nn.Linear(4, 2), torch.zeros(3, 4), "inputs of all layers are zero or not finite"),
        (nn.Linear(4, 2), torch.ones(0, 4), "inputs of all layers are zero or not finite"),
    ):
        config = BackpropClipping(whitening=InputWhitening(lambda _, public=public: public))
        with pytest.raises(ValueError, match=said):
            BackpropClipHooks(model, config=config, loss_reduction="sum")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probes": torch.ones(3)}, "Expected probes="),
        ({"power": 0.6}, "Expected power=0.6 to be a number > 0 and at most 0.5"),
        ({"power": 0}, "Expected power=0"),
        ({"damping": 0.0}, "Expected damping=0.0 to be a number >= 1e-12"),
        ({"damping": 1e-80}, "Expected damping=1e-80"),
        ({"damping": float("inf")}, "Expected damping=inf"),
        ({"rank": 0}, "Expected rank=0 to be an integer >= 1"),
        ({"every": 0}, "Expected every=0 to be an integer >= 1"),
        ({"max_size": 2.5}, "Expected max_size=2.5"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        InputWhitening(**{"probes": PinkNoise(SHAPE)} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"whitening": 0.25}, "Expected whitening=0.25 to be an InputWhitening or None"),
        (
            {"whitening": InputWhitening(PinkNoise(SHAPE)), "bound": "weighted"},
            "bound='weighted' would be far above them. Set bound=\"exact\"",
        ),
    ],
)
def test_whitening_needs_the_exact_bound(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BackpropClipping(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9), (2, 4, 5, 6)])
def test_pink_noise_has_the_spectrum_of_pictures(shape: tuple[int, ...]) -> None:
    x = PinkNoise(shape, count=300, mean=0.3, deviation=0.2)(7)
    axes = tuple(range(2, x.dim()))
    assert x.shape == (300, *shape)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean(dim=axes), torch.full((300, shape[0]), 0.3))
    torch.testing.assert_close(x.std(dim=axes, correction=0), torch.full((300, shape[0]), 0.2))
    lines = (x - 0.3).mean(dim=axes[:-1]) if axes[1:] else x - 0.3
    amplitudes = torch.fft.rfft(lines).abs().mean(dim=(0, 1))
    assert amplitudes[1] > 1.3 * amplitudes[2]
    assert torch.equal(x, PinkNoise(shape, count=300, mean=0.3, deviation=0.2)(7))
    assert not torch.equal(x, PinkNoise(shape, count=300, mean=0.3, deviation=0.2, seed=1)(7))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shape": (28,)}, r"Expected shape=\(28,\) to be the shape of one picture"),
        ({"shape": (1, 0)}, "Expected shape="),
        ({"count": 0}, "Expected count=0 to be an integer >= 1"),
        ({"seed": -1}, "Expected seed=-1"),
        ({"seed": 2**31}, "to be an integer >= 0, below 2"),
        ({"shape": 5}, "Expected shape=5"),
        ({"mean": float("nan")}, "Expected mean=nan"),
        ({"deviation": 0.0}, "Expected deviation=0.0"),
    ],
)
def test_pink_noise_out_of_range_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PinkNoise(**{"shape": SHAPE} | options)  # type: ignore[arg-type]
