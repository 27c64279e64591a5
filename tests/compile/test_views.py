"""A compiled model in `FoldViews` gives the eager gradient; what no rule bounds is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, FoldViews
from tests.helpers import Private, flat, hand_over, make_private, summed

VIEWS = 2


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)
    )


def stepped(private: Private, model: nn.Module, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, VIEWS, 1, 5, 5, generator=generator)
    y = torch.randint(3, (size, VIEWS), generator=generator)
    private.optimizer.zero_grad()
    hand_over(private, size)
    nn.functional.cross_entropy(model(x), y).backward()
    private.optimizer.step()
    return summed(private)


@pytest.mark.parametrize(
    "clipping",
    [
        BackpropClipping(),
        BackpropClipping(allocation="dimension", bound="weighted", max_input_norm=2.0),
    ],
    ids=["joint", "layerwise"],
)
def test_a_compiled_model_gives_the_eager_gradient(clipping: BackpropClipping) -> None:
    eager, private = (make_private(FoldViews(cnn(), VIEWS), backprop=clipping) for _ in range(2))
    compiled = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    for size in (4, 4, 5):
        found = stepped(private, compiled, size)
        torch.testing.assert_close(found, stepped(eager, eager.model, size), rtol=1e-4, atol=1e-6)
        assert found.norm() > 0.1
    compiled.eval()
    assert compiled(torch.zeros(3, 1, 5, 5)).shape == (3, 3)
    assert flat(private.parameters).isfinite().all()


def test_functions_that_are_followed_are_refused_in_a_graph() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(), nn.Flatten(), nn.Linear(36, 3))
    private = make_private(FoldViews(model, VIEWS), backprop=BackpropClipping())
    compiled = torch.compile(private.model, backend="aot_eager")
    with pytest.raises(
        RuntimeError, match=r"model.1 got an input of shape \(8, 4, 3, 3\) in a batch"
    ):
        stepped(private, compiled, 4)
