"""Learn the matrices that whiten layer inputs, from public examples and the model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map_only

from opacus_bpclip.config import BackpropClipping, InputWhitening, public_seed
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.sharding import unsharded
from opacus_bpclip.model.tying import Group
from opacus_bpclip.model.views import FoldViews
from opacus_bpclip.probe.randomness import repeatable
from opacus_bpclip.probe.substitutes import Substitutes
from opacus_bpclip.rules import ConvRule, LinearRule
from opacus_bpclip.rules.exact_norms import chunks, exact_chunk
from opacus_bpclip.rules.fused import FusedRule
from opacus_bpclip.rules.precision import full_precision, wide
from opacus_bpclip.rules.views import ConvOverViews
from opacus_bpclip.rules.whitened import PublicMatrix

# Modules that do something in training alone, and leave nothing for later passes.
_STATELESS = (_DropoutNd, FoldViews)

_WITH_COLUMNS = (LinearRule, ConvRule, ConvOverViews)

# The largest ratio of two eigenvalues of a matrix.
_LARGEST_RATIO = 100.0

# Of the randomised search for the largest eigenvalues (Halko, Martinsson and Tropp, 2011): how many
# more directions than are asked for it follows, and how often it multiplies them by the matrix.
_MORE_DIRECTIONS, _ITERATIONS = 8, 4


class LayerWhitening:
    """The matrix of one layer, the identity until it is learnt.

    Args:
        layer: a linear layer or a convolution.
        option: the public options.

    Attributes:
        rule: the layer's rule.
        matrix: of ``R`` groups of channels and ``D`` inputs of each.
    """

    def __init__(self, layer: Layer, option: InputWhitening) -> None:
        assert isinstance(layer.rule, FusedRule)
        self.layer, self.rule, self._option = layer, layer.rule, option
        like = wide(layer.named_parameters["weight"].detach())
        groups, size = getattr(layer.module, "groups", 1), self.rule.column_size()
        rank = min(option.rank, size)
        self.matrix = PublicMatrix(
            like.new_ones(groups),
            like.new_zeros(groups, size, rank),
            like.new_zeros(groups, rank),
        )

    def second_moments(self, x: Tensor, max_input_norm: float | None) -> Tensor:
        """Return the sum of ``u u^T`` over the columns of an input. ``[R, D, D]`` in float64."""
        (clipped,) = self.rule.prepare((wide(x),), max_input_norm).inputs
        assert clipped is not None
        groups, size, _ = self.matrix.directions.shape
        total = clipped.new_zeros(groups, size, size, dtype=torch.float64)
        positions = self.rule.columns(clipped[:1]).shape[3]
        needed = groups * size * positions * clipped.element_size()
        for rows in chunks(len(clipped), exact_chunk(needed, clipped.device)):
            columns = self.rule.columns(clipped[rows]).movedim(0, 2).flatten(2)
            total += torch.matmul(columns, columns.transpose(1, 2))
        return total

    def learn(self, moments: Tensor) -> bool:
        """Set the matrices to ``(A / a + damping * I) ** -power``, in place.

        All eigenvalues of ``A`` but the largest ones are replaced by their mean. The largest ones
        are known to a few digits. The matrix of a group stays as it is where the moments are all
        zero or not finite.

        Args:
            moments: ``[R, D, D]``, ``A`` times any number.

        Returns:
            Whether any matrix was set.
        """
        mean = moments.diagonal(dim1=1, dim2=2).mean(dim=1)
        usable = mean.isfinite() & (mean > 0)
        if not bool(usable.any()):
            return False
        scale, directions, shrinkage = self.matrix
        size, rank = directions.shape[1:]
        _, values, vectors = torch.svd_lowrank(
            moments[usable] / mean[usable].view(-1, 1, 1),
            q=min(rank + _MORE_DIRECTIONS, size),
            niter=_ITERATIONS,
        )
        values, vectors = values[:, :rank], vectors[:, :, :rank]
        # One for all that are not told apart. The eigenvalues' sum is the size.
        others = size - rank
        alike = (size - values.sum(dim=1, keepdim=True)) / others if others else values[:, -1:]
        largest, own = (
            (found.clamp(min=0) + self._option.damping) ** -self._option.power
            for found in (alike, values)
        )
        # A sum over the batch is whitened after it is made, which scales its rounding errors up.
        own = own.clamp(min=largest / _LARGEST_RATIO)
        scale[usable] = largest.squeeze(1).to(scale.dtype)
        directions[usable] = vectors.to(scale.dtype)
        shrinkage[usable] = (1 - own / largest).clamp(min=0).to(scale.dtype)
        return True


class Whitening:
    """The matrices of all layers of a model.

    Args:
        model: the model.
        config: the public options.
        groups: by name, the layers that share parameters.

    Attributes:
        steps: the number of steps that the model has taken.
        stale: whether the weights are others than those of the latest steps.
        layers: the matrices by the layer's name, of those that were asked for by `tensors_of`.
    """

    def __init__(
        self, model: nn.Module, config: BackpropClipping, groups: Mapping[str, Group]
    ) -> None:
        self.model, self.option = model, config.whitening
        self.max_input_norm = config.max_input_norm
        self.steps, self.stale = 0, False
        self.layers: dict[str, LayerWhitening] = {}
        self._alone = {name for name, group in groups.items() if len(group.layers) == 1}

    def tensors_of(self, layer: Layer) -> tuple[Tensor, ...]:
        """Return what `WhitenedRule.of` needs for a layer; empty if it is not to be whitened."""
        if self.option is None or layer.name not in self._alone:
            return ()
        if not _has_columns(layer, self.option.max_size):
            return ()
        own = self.layers[layer.name] = LayerWhitening(layer, self.option)
        return own.matrix

    def begin(self, undo: Callable[[], object]) -> None:
        """Learn the first matrices.

        Args:
            undo: called before an error is raised.

        Raises:
            ValueError: no layer is of a kind that is whitened, or the model fails on the public
                examples.
        """
        if self.option is None:
            return
        if not self.layers:
            undo()
            raise ValueError(
                "InputWhitening finds no layer to whiten: a linear layer or a convolution with a "
                "trainable weight of its own and at most "
                f"max_size={self.option.max_size} inputs. Raise max_size, or leave out whitening."
            )
        try:
            learnt = self._learn(self.option)
        except Exception as error:  # whatever the model's and the user's own code raise
            undo()
            raise ValueError(
                "The model failed on the public examples of InputWhitening: "
                f"{type(error).__name__}: {error}. Its probes must return what the model is called "
                "with in training: a tensor, a tuple of arguments, or a dict of keyword arguments."
            ) from error
        if not learnt:
            undo()
            raise ValueError(
                "The public examples of InputWhitening tell nothing: the inputs of all layers are "
                "zero or not finite, or the model does not call the layers."
            )

    def follow(self) -> None:
        """Count a step, and learn new matrices if it is time."""
        self.steps += 1
        if self.option is not None and (self.stale or self.steps % self.option.every == 0):
            self.stale = False
            self._learn(self.option)

    def restart(self) -> None:
        """Go back to the first step, with the present weights."""
        moved = self.option is not None and self.steps >= self.option.every
        self.steps = 0
        if moved and self.option is not None:
            self._learn(self.option)

    def _learn(self, option: InputWhitening) -> bool:
        """Learn new matrices; return whether any was learnt."""
        moments: dict[str, Tensor] = {}
        like = next(iter(self.layers.values())).layer.parameters[0]
        # Random numbers of their own: the noise's generator goes on as if none had been drawn, and
        # all ranks draw the same.
        seed = public_seed(self.steps)
        with repeatable(like.device, seed), _as_in_training(self.model), ExitStack() as stack:
            made = tree_map_only(Tensor, partial(_as_weights, like), option.probes(self.steps))
            args = made if isinstance(made, tuple) else (made,)
            args, kwargs = ((), made) if isinstance(made, dict) else (args, {})
            for own in self.layers.values():
                note = partial(self._note, own, moments)
                hook = own.layer.module.register_forward_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
            self.model(*args, **kwargs)
            learnt = [self.layers[name].learn(x) for name, x in moments.items()]
            return any(learnt)

    def _note(
        self,
        own: LayerWhitening,
        moments: dict[str, Tensor],
        _: nn.Module,
        args: Args,
        kwargs: Kwargs,
        __: Any,
    ) -> None:
        (x,) = own.layer.arguments.get(args, kwargs)
        assert x is not None
        found = own.second_moments(x, self.max_input_norm)
        name = own.layer.name
        moments[name] = moments[name] + found if name in moments else found


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Run a model without autograd, compilation, autocast, `nn.Dropout` and views, and no trace.

    All else is as in training. What a training pass leaves behind may hold examples, and it was
    searched that later training passes do not depend on it; passes in evaluation mode may.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(unsharded(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(full_precision())
        stack.enter_context(Substitutes(model, _copied_unless_trained))
        for module in model.modules():
            if isinstance(module, _STATELESS):
                module.training = False
        yield


def _copied_unless_trained(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _as_weights(weight: Tensor, x: Tensor) -> Tensor:
    """Copy a tensor to a weight's device, and to its dtype if it is not one of integers."""
    return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype, copy=True)


def _has_columns(layer: Layer, most: int) -> bool:
    rule = layer.rule
    # By the exact class: a subclass may describe another layer.
    if type(rule) not in _WITH_COLUMNS or layer.recurrence is not None or not rule.weight:
        return False
    assert isinstance(rule, FusedRule)
    return rule.column_size() <= most
