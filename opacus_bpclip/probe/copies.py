"""Run a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from opacus_bpclip.model.functions import ParameterFunctions
from opacus_bpclip.probe.batches import Batch
from opacus_bpclip.probe.problems import UntriedError
from opacus_bpclip.probe.progress import note_run
from opacus_bpclip.probe.randomness import Steady, repeatable
from opacus_bpclip.probe.recording import Recording, alike, recorded
from opacus_bpclip.probe.substitutes import Substitutes, lazy_parameter

# Beyond this many numbers a second copy of the model in double precision is not worth its memory.
_LARGEST_IN_DOUBLE = 2**26

# A parameter that starts at zero hides what it is multiplied with. It gets values of this size.
_ZERO_STANDS_FOR = 0.1

# A power of two, so that it can be taken back to the bit.
_SPREAD = 8.0


class Copy:
    """A model with copies of its numbers, for trial runs inside a ``with`` statement.

    What runs change is not the model's: afterwards it is what it was (`Substitutes`). Between runs,
    buffers start anew; what a run leaves in plain attributes is there in the next one, as it would
    be in training.

    Args:
        model: the model.
        double: compute in float64, so that rounding can be told from anything else.
        copied: record copies of what modules return, as `Recording` has it.

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

    def __enter__(self) -> Copy:
        self._substitutes.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._substitutes.__exit__(*error)

    @contextmanager
    def spread(self) -> Iterator[None]:
        """Make the trainable parameters larger for a while.

        The losses of a model that was never trained all lie near the logarithm of the number of
        classes: a mean with wrong weights is next to the right one. With larger logits they do not.
        """
        trained = (p for p in self._parameters.values() if p.requires_grad)
        own = [x for p in trained if (x := self._substitutes.of(p)) is not p]
        try:
            for tensor in own:
                tensor.data.mul_(_SPREAD)
            yield
        finally:
            for tensor in own:
                tensor.data.div_(_SPREAD)

    def edited(self) -> list[str]:
        """Return the parameters that runs have changed in place."""
        return [name for name, own in self._parameters.items() if self._is_edited(own)]

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Return whether the model is small enough to be copied in double precision."""
        sizes = (p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))
        return sum(sizes) <= _LARGEST_IN_DOUBLE

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return what stands in for a parameter."""
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
    ) -> Recording:
        """Run the model.

        Args:
            batch: on what.
            steady: makes random numbers the same for every example; ``None`` seeds them.
            inputs: record the modules' inputs, too.
            inside: record what the modules inside the model return, too.
            mode: entered for the run.
            plain: run the model with gradients, and without what clips them.
            seed: of the random number generators.
        """
        note_run()
        batch = batch.to(self.device, self.dtype)
        self._substitutes.begin_run()
        if isinstance(mode, ParameterFunctions):
            mode.note_arguments(batch.without_examples, batch.with_examples)
        recording = Recording(copied=self._copied)
        with (
            unclipped(self.model) if plain else torch.no_grad(),
            repeatable(self.device, seed),
            recorded(self.model, recording, inputs=inputs, inside=inside),
            steady or nullcontext(),
            mode or nullcontext(),
        ):
            self.model(*batch.args, **batch.kwargs)
        return recording

    def _substitute_of(self, tensor: Tensor) -> Tensor:
        """Return what stands in for a tensor: a copy; of a trainable zero, small values."""
        seed = self._seeds.get(id(tensor))
        if seed is None:
            return self._cast(tensor)
        trained = tensor.requires_grad
        if not (trained or self._fits):
            return tensor
        own = self._cast(tensor)
        if trained and _is_zero(own):
            drawn = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
            own = (2 * _ZERO_STANDS_FOR * drawn).to(own)
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
    """Take this package's own hooks off a model for a while.

    Clipped inputs are a part of the model, and stay.
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
    # Most have no zero in the first place, and need no second look.
    return not (bool(x.flatten()[:1].any()) or bool(x.any()))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's inputs belong."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
