"""No step of a fit is plain: every training step is a private one, and fits the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from lightning.pytorch import LightningModule

TrainingStep = Callable[..., Any]


@contextmanager
def only_private_steps(
    module: Any, private: Callable[[TrainingStep], TrainingStep]
) -> Iterator[None]:
    """Replace a module's ``training_step`` meanwhile, through which all training goes.

    A callback that trains by itself runs before the fit is private, or without its callback.

    Args:
        module: the module, or what ``torch.compile`` has made of it.
        private: is called at each step. It takes the module's own ``training_step`` and returns
            what to run instead, or raises if the step would not be private.
    """
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, LightningModule):
        yield  # Lightning says what is wrong with it.
        return
    step, replaced = module.training_step, vars(module).get("training_step")

    # Lightning looks through one wrapper for the names of the step's arguments, not through two.
    @wraps(step)
    def private_step(*args: Any, **kwargs: Any) -> Any:
        return private(step)(*args, **kwargs)

    vars(module)["training_step"] = private_step
    try:
        yield
    finally:
        del module.training_step
        if replaced is not None:
            vars(module)["training_step"] = replaced


def before_each_step(optimizer: Any, require: Callable[[], None]) -> None:
    """Call a function before each step of an optimizer, which it may refuse by raising.

    One call of ``training_step`` may take several steps.

    Args:
        optimizer: the private one.
        require: the function.
    """

    def pre_step(optimizer: Any, closure: Callable[[], float] | None = None) -> bool:
        require()
        goes_on: bool = type(optimizer).pre_step(optimizer, closure)
        return goes_on

    optimizer.pre_step = partial(pre_step, optimizer)  # A copy of the optimizer copies it, too.
