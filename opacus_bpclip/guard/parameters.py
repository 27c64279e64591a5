"""The parameters of one model: the sums of the trainable ones, and checks for changes to any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from opacus_bpclip.guard.watched import Check, WatchedParameter
from opacus_bpclip.model.changed import (
    added_problem,
    edited_problem,
    replaced_problem,
    unfrozen_problem,
)
from opacus_bpclip.model.layer import Layer


class GuardedParameters:
    """The parameters of one model.

    Args:
        model: the root module.
        layers: its trainable layers.
        whole: for sharded models, the whole parameter by the shard that the optimizer has.
        refuse: called with a gradient that arrives at a parameter, see `WatchedParameter`.
        check: called with a sum from a compiled graph, see `WatchedParameter`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[Layer],
        whole: Mapping[nn.Parameter, nn.Parameter],
        refuse: Check,
        check: Check,
    ) -> None:
        self._model, self._whole = model, dict(whole)
        self._refuse, self._check = refuse, check
        self._watched: dict[Tensor, WatchedParameter] = {}
        for layer in layers:
            for name, parameter in layer.module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in self._watched:
                    full = f"{layer.name}.{name}"
                    self._watched[parameter] = WatchedParameter(full, parameter, refuse, check)
        # A penalty in the loss may use the shard instead of the whole parameter.
        self._shards = [
            WatchedParameter(self._watched[own].name, shard, refuse, check)
            for shard, own in self._whole.items()
            if own in self._watched
        ]
        self._all = dict(model.named_parameters())
        self._frozen = {n: p for n, p in self._all.items() if p not in self._watched}
        self._versions: list[int] = []

    def watch_counts(self, counts: Mapping[str, nn.Parameter]) -> None:
        """Collect sums for counts of examples, too, which are no parameters of the model."""
        for name, count in counts.items():
            full = f"the count of {name or 'examples'}"
            self._watched[count] = WatchedParameter(full, count, self._refuse, self._check)

    def __contains__(self, parameter: Tensor) -> bool:
        """Return whether a parameter, whole or sharded, is watched."""
        return self.whole(parameter) in self._watched

    def __getitem__(self, parameter: Tensor) -> WatchedParameter:
        """Return the watch of a parameter, whole or sharded."""
        return self._watched[self.whole(parameter)]

    def whole(self, parameter: Tensor) -> Tensor:
        """Return the whole parameter of a shard; a parameter that is not sharded itself."""
        return self._whole.get(parameter, parameter)  # type: ignore[call-overload]

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """Return the watched parameters, whole."""
        return tuple(self._watched)

    @property
    def held(self) -> Iterable[Tensor]:
        """Return all that may hold a sum of physical batches, also what is frozen now."""
        return (*self._watched, *self._whole)

    @property
    def device(self) -> torch.device | None:
        """Return the device of the whole trainable parameters; ``None`` without any."""
        return next((parameter.device for parameter in self._watched), None)

    @property
    def arrivals(self) -> int:
        """Return the largest number of gradients that graphs have sent to one parameter."""
        return max((watched.arrivals for watched in self._watched.values()), default=0)

    @property
    def arrived(self) -> list[WatchedParameter]:
        """Return the parameters with gradients from compiled graphs since the last step."""
        return [watched for watched in self._watched.values() if watched.arrivals]

    @property
    def wait(self) -> bool:
        """Return whether sums of physical batches wait for their noise."""
        sums = (getattr(parameter, "summed_grad", None) for parameter in self.held)
        return any(s is not None and not hasattr(s, "_processed") for s in sums)

    def remove(self) -> None:
        """Stop watching."""
        for watched in (*self._watched.values(), *self._shards):
            watched.remove()

    def clear(self) -> None:
        """Discard all sums."""
        for watched in (*self._watched.values(), *self._shards):
            watched.clear()

    def unexamined(self) -> str | None:
        """Check that make_private has examined all parameters that train now."""
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad or parameter in self:
                continue
            if self._frozen.get(name) is parameter:
                return unfrozen_problem(name)
            return replaced_problem(name) if name in self._all else added_problem(name)
        return None

    def begin_forward(self) -> None:
        """Record the parameters' versions before a forward pass."""
        self._versions = [parameter._version for parameter in self._all.values()]

    def edited(self) -> str | None:
        """Check that the forward pass changed no parameter in place."""
        versions, self._versions = self._versions, []
        for (name, parameter), version in zip(self._all.items(), versions, strict=False):
            if parameter._version != version:
                return edited_problem(name)
        return None
