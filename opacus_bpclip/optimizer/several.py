"""Several optimizers that step together, on one release of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class SeveralOptimizers(torch.optim.Optimizer):
    """Optimizers over different parameters of one model, for one `make_private`.

    If each were made private on its own, each would release gradients of the same sample, and the
    accountant would count one sample as several independent ones. As one optimizer they share one
    step, one draw of noise for each parameter, and one entry in the accountant.

    Args:
        *optimizers: two or more; no parameter is in two of them.

    Raises:
        ValueError: there are fewer than two, or a parameter is in two of them.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> both = SeveralOptimizers(
        ...     torch.optim.SGD(model[0].parameters(), lr=0.1),
        ...     torch.optim.Adam(model[1].parameters(), lr=0.001),
        ... )
        >>> [group["lr"] for group in both.param_groups]
        [0.1, 0.001]
    """

    # Without torch's __init__, which would create other groups and another state.
    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        if len(optimizers) < 2:
            raise ValueError(f"Expected two optimizers or more, got {len(optimizers)}.")
        held = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        if len(set(held)) < len(held):
            raise ValueError("A parameter is in two of the optimizers. Give it to one of them.")
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the groups of all optimizers, in their order."""
        return [group for each in self.optimizers for group in each.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """Return the states of all optimizers, by parameter. Changes to it have no effect."""
        return {p: value for each in self.optimizers for p, value in each.state.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Return an empty dictionary: each optimizer has its own defaults."""
        return {}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step each optimizer.

        Args:
            closure: evaluates the model and returns the loss; run once.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.optimizers:
            each.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all optimizers."""
        for each in self.optimizers:
            each.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse, as it is unknown which optimizer the group is for.

        Raises:
            ValueError: always.
        """
        raise ValueError("Add the group to one of the optimizers, before make_private.")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of each optimizer."""
        for each, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            each.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
