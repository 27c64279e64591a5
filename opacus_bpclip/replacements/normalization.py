"""Replacements of normalisation layers that use statistics of the batch.

They compute another function: ``docs/supported-layers.md`` says which. Proof: the replacements are
layers that have rules, ``docs/rules/normalization.md``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from opacus_bpclip.replacements.base import Copies

# The smallest number of channels that are normalised together. For plain vectors they are all the
# entries of a group: two entries would always become 1 and -1, so the layers below would get no
# gradient.
SMALLEST_GROUP = 8
MOST_GROUPS = 32
FEWEST_FEATURES = 3

# Batch normalisations that also apply their modules `drop` and `act`, by dotted path.
_WITH_ACTIVATION = {
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
}


class FixedBatchNorm(_BatchNorm):
    """A frozen batch normalisation, for any number of axes, that stays in evaluation mode.

    Its running statistics and parameters are constants, so it does not mix examples.
    """

    def train(self, mode: bool = True) -> FixedBatchNorm:
        """Stay in evaluation mode, whatever the model around does."""
        super().train(False)
        return self

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        pass


def groups_of(channels: int) -> int:
    """Return the number of groups of a GroupNorm that replaces a BatchNorm.

    It is the largest number up to `MOST_GROUPS` that divides the channels evenly into groups of at
    least `SMALLEST_GROUP`; 1 if there is none.

    Example:
        >>> [groups_of(channels) for channels in (3, 16, 17, 64, 512)]
        [1, 2, 1, 8, 32]
    """
    most = min(MOST_GROUPS, channels // SMALLEST_GROUP)
    return next((groups for groups in range(most, 1, -1) if channels % groups == 0), 1)


def mixes_examples(norm: nn.Module) -> bool:
    """Return whether a batch normalisation, in its present mode, uses the batch's statistics."""
    assert isinstance(norm, _BatchNorm)
    return norm.training or norm.running_mean is None


def forward_kind(norm: nn.Module) -> type[nn.Module]:
    """Return the class whose forward a batch normalisation must have to be replaced."""
    for base in type(norm).__mro__:
        if f"{base.__module__}.{base.__qualname__}" in _WITH_ACTIVATION:
            return base
    return nn.SyncBatchNorm if isinstance(norm, nn.SyncBatchNorm) else _BatchNorm


def per_example(norm: _BatchNorm, copies: Copies) -> nn.Module:
    """Return the replacement of a batch normalisation.

    It is a `FixedBatchNorm` if all parameters are frozen and there are running statistics;
    otherwise a ``nn.GroupNorm``. Modules that run after the normalisation are kept.

    Args:
        norm: the module to replace.
        copies: makes copies of its parameters.
    """
    own = [parameter for parameter in norm._parameters.values() if parameter is not None]
    frozen = bool(own) and not any(parameter.requires_grad for parameter in own)
    made: nn.Module
    if frozen and norm.running_mean is not None:
        made = FixedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine)
        made._buffers.update(copy.deepcopy(norm._buffers, copies.memo))
    else:
        made = nn.GroupNorm(
            groups_of(norm.num_features), norm.num_features, norm.eps, norm.affine, device="meta"
        )
    _take_parameters(made, norm, copies)
    made.train(norm.training)
    if not norm._modules:
        return made
    sequence = nn.Sequential(OrderedDict(norm=made))
    for name in ("drop", "act"):
        sequence.add_module(name, copy.deepcopy(norm.get_submodule(name), copies.memo))
    sequence.training = norm.training
    return sequence


def without_statistics(norm: _InstanceNorm, copies: Copies) -> nn.Module:
    """Return the same instance normalisation without running statistics, as it is in training.

    Args:
        norm: the module to replace.
        copies: makes copies of its parameters.
    """
    kind = next(base for base in type(norm).__mro__ if base in _INSTANCE_NORMS)
    made = kind(norm.num_features, norm.eps, affine=norm.affine, device="meta")
    _take_parameters(made, norm, copies)
    return made.train(norm.training)


def bare(norm: _NormBase) -> nn.Module:
    """Return a copy without inner modules and, of an instance norm, without running statistics."""
    copied = copy.deepcopy(norm)
    copied._modules.clear()
    if isinstance(norm, _InstanceNorm):
        copied._buffers.update(dict.fromkeys(copied._buffers))
        copied.track_running_stats = False
    return copied


def dead(norm: nn.Module, shapes: list[tuple[int, ...]], generator: torch.Generator) -> str | None:
    """Return on which made-up batch the input gets almost no gradient; ``None`` if on none.

    Args:
        norm: the replacement; it is not changed.
        shapes: the shapes of the batches.
        generator: draws the batches.
    """
    trial = copy.deepcopy(norm).to_empty(device="cpu").double()
    for name, value in (*trial.named_parameters(), *trial.named_buffers()):
        value.data.fill_("bias" not in name and "mean" not in name)
    for shape in shapes:
        x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        y = trial(x)
        target = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(y, x, target)
        smallest = gradient.flatten(1).norm(dim=1).amin()
        if y.shape != x.shape or not smallest > _LEAST_GRADIENT:
            return f"on a batch of shape {shape} an example's gradient is {float(smallest):.2g}"
    return None


_LEAST_GRADIENT = 1e-3
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _take_parameters(made: nn.Module, norm: _NormBase, copies: Copies) -> None:
    for name, parameter in norm._parameters.items():
        if parameter is not None:
            made._parameters[name] = copies.parameter(parameter)
