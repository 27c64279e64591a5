"""Trial runs of a model that leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from opacus_bpclip.model.functions import ParameterFunctions
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.buffers import Buffers, buffers_of, differing
from opacus_bpclip.probe.problems import UntriedError
from opacus_bpclip.probe.progress import note_run
from opacus_bpclip.probe.randomness import Steady, repeatable
from opacus_bpclip.probe.recording import Recording, alike, gradients_of, recorded
from opacus_bpclip.probe.substitutes import Substitutes, lazy_parameter

# A model with more parameters is not copied in double precision, which would need much memory.
_LARGEST_IN_DOUBLE = 2**26

# A parameter of zeros hides whatever it is multiplied by, so trial runs use values of this size.
_INSTEAD_OF_ZERO = 0.1

# A power of two, so that it can be undone exactly.
_SPREAD = 8.0


class Copy:
    """A model with copies of its tensors, for trial runs inside a ``with`` statement.

    After the statement the model is restored (`Substitutes`). Each run starts with the model's own
    buffers, unless it goes on from those of the run before. Changes that a run makes to plain
    attributes last until the statement ends, as they would last in training.

    Args:
        model: the model.
        double: compute in float64, so that rounding errors are far below any real difference.
        copied: record copies of the modules' outputs, see `Recording`.

    Raises:
        UntriedError: a parameter has no shape yet.
    """

    def __init__(self, model: nn.Module, *, double: bool, copied: bool = True) -> None:
        lazy = lazy_parameter(model)
        if lazy is not None:
            raise UntriedError(f"{lazy} has no shape yet: run one batch through the model first")
        self.model = model
        self.dtype = torch.float64 if double else None
        self.device = device_of(model)
        self._copied = copied
        self._fits = self.fits(model)
        self._parameters = dict(model.named_parameters())
        self._seeds = {id(p): seed for seed, p in enumerate(self._parameters.values())}
        self._versions = {id(p): _version(p) for p in self._parameters.values()}
        self._substitutes = Substitutes(model, self._substitute_of)
        self._buffers: Buffers = {}
        self._written: set[str] = set()

    def __enter__(self) -> Copy:
        self._substitutes.__enter__()
        try:
            self._buffers = buffers_of(self.model, copied=True)
        except BaseException:
            self._substitutes.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._substitutes.__exit__(*error)

    @contextmanager
    def spread(self) -> Iterator[None]:
        """Make the trainable parameters larger for a while.

        In an untrained model all examples' losses are close to the logarithm of the number of
        classes, so a mean with wrong weights is close to the right one. Larger logits spread the
        losses.
        """
        own = [x for p in self._trained() if (x := self._substitutes.of(p)) is not p]
        try:
            for tensor in own:
                tensor.data.mul_(_SPREAD)
            yield
        finally:
            for tensor in own:
                tensor.data.div_(_SPREAD)

    def writes(self) -> bool:
        """Return whether any run has changed a buffer, an attribute or what an attribute holds."""
        return bool(self._written) or self._substitutes.attributes_changed()

    def written(self) -> set[str]:
        """Return the names of the buffers that any run has changed."""
        return set(self._written)

    def edited(self) -> list[str]:
        """Return the names of the parameters that runs have changed in place."""
        return [name for name, own in self._parameters.items() if self._is_edited(own)]

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether the model is small enough to be copied in double precision."""
        sizes = (p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))
        return sum(sizes) <= _LARGEST_IN_DOUBLE

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the substitute of a parameter."""
        substitute = self._substitutes.of(parameter)
        assert isinstance(substitute, nn.Parameter)
        return substitute

    def run(
        self,
        batch: Batch,
        steady: Steady | None,
        *,
        inputs: bool = False,
        inside: bool = True,
        mode: AbstractContextManager[object] | None = None,
        plain: bool = False,
        seed: int = 0,
        carry: bool = False,
        gradients: bool = False,
    ) -> Recording:
        """Run the model.

        Args:
            batch: the batch to run on.
            steady: makes random numbers the same for every example; with ``None`` they are drawn
                as usual, from generators that are seeded.
            inputs: record the modules' inputs, too.
            inside: record the outputs of the modules inside the model, too.
            mode: a context that the run is in.
            plain: run the model with gradients, and without the hooks that clip them.
            seed: the seed of the random number generators.
            carry: go on from the buffers that the run before has left, as in training.
            gradients: record the parameters' gradients for made-up gradients of the outputs; the
                run must be plain.
        """
        note_run()
        batch = batch.to(self.device, self.dtype)
        self._substitutes.begin_run(carry=carry)
        if isinstance(mode, ParameterFunctions):
            mode.note_arguments(batch.without_examples, batch.with_examples)
        recording = Recording(copied=self._copied)
        with (
            torch.set_grad_enabled(plain),
            unclipped(self.model) if plain else nullcontext(),
            repeatable(self.device, seed),
            recorded(self.model, recording, inputs=inputs, inside=inside),
            steady or nullcontext(),
            mode or nullcontext(),
        ):
            output = self.model(*batch.args, **batch.kwargs)
            if gradients:
                recording.gradients = gradients_of(output, map(self.of, self._trained()))
        self._written.update(differing(self._buffers, buffers_of(self.model)))
        return recording

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._parameters.values() if p.requires_grad]

    def _substitute_of(self, tensor: Tensor) -> Tensor:
        """Make a tensor's substitute: a copy, or small values for a trainable tensor of zeros."""
        seed = self._seeds.get(id(tensor))
        if seed is None:
            return self._cast(tensor)
        trained = tensor.requires_grad
        if not (trained or self._fits):
            return tensor
        own = self._cast(tensor)
        if trained and _is_zero(own):
            drawn = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
            own = (2 * _INSTEAD_OF_ZERO * drawn).to(own)
        substitute = nn.Parameter(own, requires_grad=trained)
        vars(substitute).update(vars(tensor))
        return substitute

    def _is_edited(self, parameter: Tensor) -> bool:
        substitute = self._substitutes.of(parameter)
        if substitute is parameter:
            return self._versions[id(parameter)] != _version(parameter)
        return not alike(substitute, self._substitute_of(parameter))

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else None
        return tensor.detach().to(dtype, copy=True)


@contextmanager
def unclipped(model: nn.Module) -> Iterator[None]:
    """Remove this package's clipping hooks from a model for a while.

    The hooks that clip inputs stay: they are a part of the model.
    """
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(map(_clips, hooks.values())):
                taken.append((hooks, dict(hooks)))
                for key in [key for key, hook in hooks.items() if _clips(hook)]:
                    del hooks[key]
    cache, kept = parametrize._cache, dict(parametrize._cache)
    cache.clear()
    try:
        yield
    finally:
        cache.clear()
        cache.update(kept)
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)


def _clips(hook: object) -> bool:
    module = str(getattr(hook, "__module__", ""))
    return module == "opacus_bpclip.hooks" or module.startswith("opacus_bpclip.clipping.")


def _is_zero(x: Tensor) -> bool:
    # Most tensors begin with another number, and need not be read in full.
    return not (bool(x.flatten()[:1].any()) or bool(x.any()))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model's inputs must be on."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
