"""Pink noise in the shape of the data loader's images, and the options for images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from opacus_bpclip import (
    AugmentedViews,
    BackpropClipHooks,
    BackpropClipping,
    FoldViews,
    InputWhitening,
    PinkNoise,
    PrivacyEngine,
)

SHAPE = (2, 6, 5)
IMAGES, LABELS = torch.randn(20, *SHAPE), torch.randint(3, (20,))
PAIRS = TensorDataset(IMAGES, LABELS)


class Named(Dataset[dict[str, Tensor]]):
    """Items as Hugging Face's data sets have them."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("a stream was read")

    def __len__(self) -> int:
        return 20


class OfNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, pixel_values: Tensor) -> Tensor:
        output: Tensor = self.inner(pixel_values)
        return output


class MaskFirst(OfNames):
    def forward(  # type: ignore[override]
        self, mask: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> Tensor:
        assert pixel_values is not None
        return super().forward(pixel_values)


class OfViews(OfNames):
    """Holds `FoldViews` inside of a model of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FoldViews(network(), views=3)  # type: ignore[assignment]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))


def make_private(model: nn.Module, data: Any, clipping: BackpropClipping, **options: Any) -> Any:
    make, noise = "make_private_with_epsilon", {}
    if "target_epsilon" not in options:
        make, noise = "make_private", {"noise_multiplier": 1.0}
    return getattr(PrivacyEngine(), make)(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=5),
        max_grad_norm=1.0,
        clipping="backprop",
        backprop=clipping,
        loss_reduction="sum",
        **noise,
        **options,
    )


def matrices(private: Any) -> list[Tensor]:
    return [own.matrix.directions for own in private[1]._hooks._whitening.layers.values()]


OF_EPSILON = {"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 4}


# Opacus's search for the noise, of so few examples.
@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
@pytest.mark.parametrize(
    ("make", "data", "options"),
    [
        (network, PAIRS, {}),
        (network, PAIRS, {"poisson_sampling": False}),
        (network, PAIRS, OF_EPSILON),
        (OfNames, Named(), {}),
        (
            lambda: FoldViews(network(), views=3),
            AugmentedViews(PAIRS, lambda x: x + torch.randn_like(x), views=3),
            {},
        ),
        (OfViews, AugmentedViews(PAIRS, lambda x: x + torch.randn_like(x), views=3), {}),
    ],
    ids=["pairs", "not sampled", "epsilon", "names", "views", "views inside"],
)
def test_the_shape_is_that_of_the_loaders_images(make: Any, data: Any, options: Any) -> None:
    found = matrices(make_private(make(), data, BackpropClipping.for_images(), **options))
    given = BackpropClipping.for_images(SHAPE)
    assert given == BackpropClipping(max_input_norm=3.0, whitening=InputWhitening(PinkNoise(SHAPE)))
    expected = matrices(make_private(make(), data, given, **options))
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.any()
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (nn.Linear(4, 3), TensorDataset(torch.randn(20, 4), LABELS)),
        (
            nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(9, 3)),
            TensorDataset(torch.randn(20, 3, 4), LABELS),
        ),
        (MaskFirst(), Named()),
        (
            nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3)),
            TensorDataset(torch.randint(9, (20, 2, 3)), LABELS),
        ),
        (nn.Bilinear(5, 5, 3), TensorDataset(IMAGES, IMAGES, LABELS)),
        (network(), Endless()),
    ],
    ids=["vectors", "sequences", "second argument", "words", "two inputs", "a stream"],
)
def test_other_inputs_are_refused_with_the_remedy(model: nn.Module, data: Any) -> None:
    clipping = BackpropClipping(whitening=InputWhitening())
    sampling = {"poisson_sampling": False} if isinstance(data, Endless) else {}
    with pytest.raises(ValueError, match=r"not known to be images.*for_images\(shape\) or Pink"):
        make_private(model, data, clipping, **sampling)
    assert not any(module._forward_hooks for module in model.modules())
    options = {"data_loader": DataLoader(data), "clipping": "backprop", "backprop": clipping}
    if not sampling:
        with pytest.raises(ValueError, match="not known to be images"):
            PrivacyEngine().validate(module=model, **options)
        assert not PrivacyEngine().is_compatible(module=model, **options)


def test_the_remedy_for_a_stream_is_the_shape() -> None:
    clipping = BackpropClipping.for_images(SHAPE)
    assert matrices(make_private(network(), Endless(), clipping, poisson_sampling=False))[0].any()


def test_hooks_alone_have_no_loader_to_look_at() -> None:
    config = BackpropClipping(whitening=InputWhitening())
    with pytest.raises(ValueError, match="PinkNoise needs the shape of one picture"):
        BackpropClipHooks(network(), config=config, loss_reduction="sum")
