"""The built-in cases: one for each family of layers, one of several layers, two of shared weights.

Each has a worst case: an input with one large entry, and an upstream gradient with one large entry
that is multiplied by it. Every bound of the layer's gradient then equals its norm. So the clipped
gradient has norm Delta_l with a budget for each layer, and Delta over all layers with a joint one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from opacus_bpclip.audit.engine_target import EngineTrainer
from opacus_bpclip.audit.settings import MAX_GRAD_NORM, Reduction
from opacus_bpclip.audit.target import LARGE, Target, spiked
from opacus_bpclip.config import BackpropClipping

_ORDINARY = 2  # examples in the batch of the statistical checks
_CROWD = 24  # examples in a crowd
# Of a crowd's upstream gradients. Those near the limit pull against the example that joins them: a
# sum that is too small for one more shows. Those far above it pull with that example: a mean loss
# divides their gradients by one more, and whatever grows with another power of them shows.
_CROWD_SCALES = (
    *(-(2.0**power) for power in range(-3, 7)),
    *(8.0**power for power in range(3, 11)),
)


@dataclass(frozen=True)
class Case:
    """A tiny model and its worst case.

    Args:
        make_model: makes it.
        inputs: shape of an example's input.
        outputs: number of output entries of an example.
        input_spikes: flat positions of the worst input's large entries.
        output_spikes: flat positions of the worst upstream gradient's.
        vocabulary: number of tokens, for inputs that are ids; the worst input repeats token 0.
        uses: of layers that are used more than once, for budgets of each layer's own.
        attained_with_clipped_inputs: whether the worst case reaches the sensitivity where layers
            clip their inputs, too.
    """

    make_model: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    outputs: int
    input_spikes: tuple[int, ...] = (0,)
    output_spikes: tuple[int, ...] = (0,)
    vocabulary: int | None = None
    uses: Mapping[str, int] = field(default_factory=dict)
    attained_with_clipped_inputs: bool = True

    def target(
        self,
        name: str,
        *,
        loss_reduction: Reduction = "mean",
        max_grad_norm: float = MAX_GRAD_NORM,
        clipping: BackpropClipping | None = None,
        device: torch.device | str = "cpu",
    ) -> Target:
        """Return a target that trains the case's model by this package's engine."""
        x = spiked(torch.zeros(1, *self.inputs), self.input_spikes)
        g = spiked(torch.zeros(1, self.outputs), self.output_spikes)
        # The same input at every position, where all gradients add up.
        everywhere = torch.full_like(x, LARGE)
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(_ORDINARY, self.outputs, generator=generator)
        shape = (_ORDINARY, *self.inputs)
        if self.vocabulary is None:
            inputs = torch.randn(shape, generator=generator)
        else:
            inputs = torch.randint(self.vocabulary, shape, generator=generator)
            x = everywhere = torch.zeros_like(x, dtype=torch.long)
        crowd = x.repeat(_CROWD, *(1,) * len(self.inputs))
        crowds = [
            (crowd, g.repeat(_CROWD, 1) / LARGE * scale * max_grad_norm) for scale in _CROWD_SCALES
        ]
        clipping = replace(clipping or BackpropClipping(), uses=self.uses)
        return Target(
            name=name,
            make=partial(
                EngineTrainer,
                self.make_model,
                None,
                max_grad_norm=max_grad_norm,
                loss_reduction=loss_reduction,
                clipping=clipping,
                device=device,
            ),
            batches=((inputs, upstream), *crowds),
            canaries=((x, g), (everywhere, torch.full_like(g, LARGE)), (everywhere, g)),
            attained=self.attained_with_clipped_inputs or clipping.max_input_norm is None,
        )


class SideBySide(nn.Module):
    """Layers side by side, each on its own part of the input and of the output.

    Nothing that an example does in one layer limits another one: all can reach their Delta_l on the
    same example. With a joint budget all of them use it up together.

    Args:
        layers: in the order of their parts, which are equally large; one may be there twice.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, inputs]`` to ``[B, outputs]``."""
        parts = x.chunk(len(self.layers), dim=1)
        outputs = (layer(part) for layer, part in zip(self.layers, parts, strict=True))
        return torch.cat([*outputs], dim=1)


def _branches() -> nn.Module:
    conv = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten())
    return SideBySide(nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.LayerNorm(4), conv)


def _shared() -> nn.Module:
    """Return a layer that is used twice, and two layers that share a weight.

    The uses of a weight can all pull it the same way: what they contribute adds up.
    """
    twice = nn.Linear(4, 3)
    left, right = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    right.weight = left.weight
    return SideBySide(twice, twice, left, right)


class TiedEmbedding(nn.Module):
    """An embedding whose weight is that of the output head, too, as in language models.

    Where the head predicts the token that it sees, both uses change the same row of the weight in
    the same direction.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(10, 3), nn.Linear(3, 10, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids ``[B, T]`` to one output for each position and token, ``[B, 10 T]``."""
        return self.head(self.tokens(ids)).flatten(1)


def _bias_alone() -> nn.Module:
    layer = nn.Linear(4, 30)
    layer.weight.requires_grad_(False)
    return layer


# Each has at least 25 parameters, so that few steps draw enough noise to judge its law.
CASES: Mapping[str, Case] = {
    "linear": Case(lambda: nn.Linear(5, 5), (5,), 5),
    "sequence-linear": Case(lambda: nn.Linear(5, 5), (3, 5), 15),
    "conv": Case(
        lambda: nn.Conv2d(1, 3, 3, padding=1), (1, 4, 4), 48, input_spikes=(5,), output_spikes=(5,)
    ),
    "embedding": Case(lambda: nn.Embedding(10, 3), (4,), 12, vocabulary=10),
    "bias": Case(_bias_alone, (4,), 30),
    "layer-norm": Case(lambda: nn.LayerNorm(15), (15,), 15),
    "rms-norm": Case(lambda: nn.RMSNorm(25), (25,), 25),
    "group-norm": Case(lambda: nn.GroupNorm(5, 15), (15, 2), 30),
    "instance-norm": Case(lambda: nn.InstanceNorm1d(15, affine=True), (15, 3), 45),
    "branches": Case(_branches, (16,), 14, input_spikes=(0, 4, 8, 13), output_spikes=(0, 3, 6, 10)),
    "shared": Case(
        _shared,
        (16,),
        12,
        input_spikes=(0, 4, 8, 12),
        output_spikes=(0, 3, 6, 9),
        uses={"layers.0": 2},
    ),
    "tied-embedding": Case(
        TiedEmbedding, (4,), 40, vocabulary=10, attained_with_clipped_inputs=False
    ),
}
