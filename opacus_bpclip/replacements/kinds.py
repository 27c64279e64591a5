"""The replacers: for each kind of layer, when it is replaced, by what, and how it is compared."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from opacus_bpclip.replacements import normalization, recurrent, trials, verify
from opacus_bpclip.replacements.attention import MultiheadAttention
from opacus_bpclip.replacements.base import Copies, Replacer, common_obstacle

_NETWORKS: dict[type[nn.RNNBase], type[recurrent.Recurrent]] = {
    nn.RNN: recurrent.RNN,
    nn.LSTM: recurrent.LSTM,
    nn.GRU: recurrent.GRU,
}


def replacer_of(module: nn.Module) -> Replacer | None:
    """Return the replacer of a module; ``None`` if it needs no replacement or none is known."""
    return next((replacer for replacer in _REPLACERS if replacer.is_needed(module)), None)


class _Attention(Replacer):
    keeps_state = True

    def is_needed(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and _is_trained(module)

    def obstacle(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        return common_obstacle(module, nn.MultiheadAttention, module.out_proj)

    def make(self, module: nn.Module, copies: Copies) -> nn.Module:
        assert isinstance(module, nn.MultiheadAttention)
        return MultiheadAttention.of(module, copies)

    def difference(self, module: nn.Module, made: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        generator = torch.Generator().manual_seed(0)
        pair = verify.twins(module, made, generator)
        return verify.first_difference(pair, trials.attention_calls(module, generator))


class _Network(Replacer):
    keeps_state = True

    def is_needed(self, module: nn.Module) -> bool:
        return isinstance(module, tuple(_NETWORKS)) and _is_trained(module)

    def obstacle(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.RNNBase)
        if module.proj_size:
            return (
                "has a proj_size, which is not supported: leave proj_size out, and apply a Linear "
                "layer to its outputs"
            )
        return common_obstacle(module, self._kind(module))

    def make(self, module: nn.Module, copies: Copies) -> nn.Module:
        assert isinstance(module, nn.RNNBase)
        return _NETWORKS[self._kind(module)].of(module, copies)

    def difference(self, module: nn.Module, made: nn.Module) -> str | None:
        assert isinstance(module, nn.RNNBase)
        generator = torch.Generator().manual_seed(0)
        pair = verify.twins(module, made, generator)
        return verify.first_difference(pair, trials.recurrent_calls(module, generator))

    def _kind(self, module: nn.Module) -> type[nn.RNNBase]:
        return next(kind for kind in _NETWORKS if isinstance(module, kind))


class _OfTheBatch(Replacer):
    def is_needed(self, module: nn.Module) -> bool:
        if not isinstance(module, _BatchNorm):
            return False
        return _is_trained(module) or normalization.mixes_examples(module)

    def obstacle(self, module: nn.Module) -> str | None:
        assert isinstance(module, _BatchNorm)
        common = common_obstacle(module, normalization.forward_kind(module))
        features = module.num_features
        if common or not isinstance(module, nn.BatchNorm1d):
            return common
        if features < normalization.FEWEST_FEATURES:
            return (
                f"has {features} feature{'s' * (features > 1)}, too few to normalise within one "
                "example: leave it out (nn.Identity()), or use nn.GroupNorm(1, "
                f"{features}) if its inputs are sequences, [B, {features}, L]"
            )
        return None

    def make(self, module: nn.Module, copies: Copies) -> nn.Module:
        assert isinstance(module, _BatchNorm)
        return normalization.per_example(module, copies)

    def difference(self, module: nn.Module, made: nn.Module) -> str | None:
        assert isinstance(module, _BatchNorm)
        generator = torch.Generator().manual_seed(0)
        norm = made.norm if isinstance(made, nn.Sequential) else made
        assert isinstance(norm, nn.Module)
        if isinstance(norm, normalization.FixedBatchNorm):
            pair = verify.twins(normalization.bare(module), norm, generator)
            return verify.first_difference(pair, trials.norm_calls(module, generator))
        shape = (2, module.num_features)
        shapes: list[tuple[int, ...]] = [(*shape, 3, 3)]
        if module.num_features >= normalization.FEWEST_FEATURES:
            shapes.append(shape)
        return normalization.dead(norm, shapes, generator)


class _OfInstances(Replacer):
    def is_needed(self, module: nn.Module) -> bool:
        if not isinstance(module, _InstanceNorm) or not module.track_running_stats:
            return False
        return _is_trained(module) or module.training

    def obstacle(self, module: nn.Module) -> str | None:
        return common_obstacle(module, _InstanceNorm)

    def make(self, module: nn.Module, copies: Copies) -> nn.Module:
        assert isinstance(module, _InstanceNorm)
        return normalization.without_statistics(module, copies)

    def difference(self, module: nn.Module, made: nn.Module) -> str | None:
        assert isinstance(module, _InstanceNorm)
        generator = torch.Generator().manual_seed(0)
        pair = verify.twins(normalization.bare(module), made, generator)
        for each in pair:
            each.train()
        return verify.first_difference(pair, trials.norm_calls(module, generator))


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


_REPLACERS: tuple[Replacer, ...] = (_Attention(), _Network(), _OfTheBatch(), _OfInstances())
