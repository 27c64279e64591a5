"""Models that call functions on parameters of their own: they train, each example clipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from tests.budgets import layerwise
from tests.checks import Trainer, check_sensitivity
from tests.helpers import FEATURES
from tests.joint.helpers import clipped_flat, own_gradients, released

# Some layers have the batch on another axis than their rule, which leaves no way to clip inputs.
CLIPPINGS = (BackpropClipping(), layerwise(bound="exact", max_input_norm=None, uses="auto"))


def check_followed(
    make: Callable[[], nn.Module],
    x: Tensor | None = None,
    clippings: Sequence[BackpropClipping] = CLIPPINGS,
) -> None:
    """Each example contributes its own gradient by plain autograd, clipped as a whole.

    Args:
        make: makes the model; it is seeded, so that all it makes are equal.
        x: the examples, made up by default.
        clippings: under which one example is also taken out of the batch, to see what that moves.
    """

    def made() -> nn.Module:
        torch.manual_seed(1)
        return make().double()

    torch.manual_seed(0)
    x = torch.randn(4, FEATURES).double() if x is None else x
    shape = tuple(x.shape[1:])
    target = torch.randn_like(made()(x).flatten(1)) * torch.logspace(-2, 2, len(x))[:, None]
    # A model for each example: with spectral_norm, a forward pass changes the next one's weight.
    own = [own_gradients(made(), x[[row]], target[[row]])[0] for row in range(len(x))]
    assert any(gradient.any() for gradient in own)
    # From a limit that clips to one that does not.
    for limit in (1e-3, 1.0, 1e5):
        trainer = Trainer(made(), shape, BackpropClipping(), max_grad_norm=limit, probe=True)
        found, expected = released(trainer, x, target), clipped_flat(own, limit)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * min(limit, 1.0))
    for clipping in clippings:
        check_sensitivity(Trainer(made(), shape, clipping, probe=True), x, 100 * target)
