"""All parameters of one model: what is collected for those that train, and what is done to any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from opacus_bpclip.guard.watched import Check, WatchedParameter
from opacus_bpclip.model.coverage import edited_problem, unfrozen_problem
from opacus_bpclip.model.layer import Layer


class GuardedParameters:
    """The parameters of one model.

    Args:
        model: the root module.
        layers: its trainable layers.
        whole: the parameters that layers compute with, by the sharded ones that the optimizer has.
        refuse: as for `WatchedParameter`.
        check: as for `WatchedParameter`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[Layer],
        whole: Mapping[nn.Parameter, nn.Parameter],
        refuse: Check,
        check: Check,
    ) -> None:
        self._whole = dict(whole)
        self._watched: dict[Tensor, WatchedParameter] = {}
        for layer in layers:
            for name, parameter in layer.module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in self._watched:
                    full = f"{layer.name}.{name}"
                    self._watched[parameter] = WatchedParameter(full, parameter, refuse, check)
        # A penalty in the loss may be on what the optimizer has.
        self._shards = [
            WatchedParameter(self._watched[own].name, shard, refuse, check)
            for shard, own in self._whole.items()
            if own in self._watched
        ]
        self._all = dict(model.named_parameters())
        self._frozen = {n: p for n, p in self._all.items() if p not in self._watched}
        self._versions: list[int] = []

    def __contains__(self, parameter: Tensor) -> bool:
        """Return whether a parameter, whole or sharded, is watched."""
        return self.whole(parameter) in self._watched

    def __getitem__(self, parameter: Tensor) -> WatchedParameter:
        """Return what is collected for a parameter, whole or sharded."""
        return self._watched[self.whole(parameter)]

    def whole(self, parameter: Tensor) -> Tensor:
        """Return what layers compute with in a parameter's place; itself if it is not sharded."""
        return self._whole.get(parameter, parameter)  # type: ignore[call-overload]

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """Return the watched ones, whole."""
        return tuple(self._watched)

    @property
    def device(self) -> torch.device | None:
        """Return where the trained ones are whole; ``None`` without any."""
        return next((parameter.device for parameter in self._watched), None)

    @property
    def arrivals(self) -> int:
        """Return how many gradients of compiled graphs the parameter with most has."""
        return max((watched.arrivals for watched in self._watched.values()), default=0)

    @property
    def arrived(self) -> list[WatchedParameter]:
        """Return those whose gradients compiled graphs have sent since the last step."""
        return [watched for watched in self._watched.values() if watched.arrivals]

    @property
    def wait(self) -> bool:
        """Return whether sums of physical batches wait for their noise."""
        held = (*self._watched, *self._whole)
        sums = (getattr(parameter, "summed_grad", None) for parameter in held)
        return any(s is not None and not hasattr(s, "_processed") for s in sums)

    def remove(self) -> None:
        """Stop watching."""
        for watched in (*self._watched.values(), *self._shards):
            watched.remove()

    def clear(self) -> None:
        """Forget what was collected."""
        for watched in (*self._watched.values(), *self._shards):
            watched.clear()

    def unfrozen(self) -> str | None:
        """Say which parameter that nobody examined is to be trained."""
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                return unfrozen_problem(name)
        return None

    def begin_forward(self) -> None:
        """Note what the parameters are before a forward pass."""
        self._versions = [parameter._version for parameter in self._all.values()]

    def edited(self) -> str | None:
        """Say which parameter has changed since, and forget what they were."""
        versions, self._versions = self._versions, []
        for (name, parameter), version in zip(self._all.items(), versions, strict=False):
            if parameter._version != version:
                return edited_problem(name)
        return None
